"""`deepspeed [--hostfile H] launch/evaluate.py RUN_OR_MODEL ...`: every rank runs this file, as `kto-dist evaluate`.

`--module kto_dist.commands.evaluate` does the same without a checkout; slurm's launcher takes files alone.
"""

from kto_dist.commands.entry import script

if __name__ == "__main__":
    script("evaluate")
