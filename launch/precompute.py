"""`deepspeed [--hostfile H] launch/precompute.py CONFIG [section.key=value ...]`: every rank runs this file.

`--module kto_dist.commands.precompute` does the same without a checkout; slurm's launcher takes files alone.
"""

from kto_dist.commands.entry import script

if __name__ == "__main__":
    script("precompute")
