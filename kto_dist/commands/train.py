"""`deepspeed [--hostfile H] --module kto_dist.commands.train CONFIG [section.key=value ...]`: every rank runs this.

It needs no checkout. `launch/train.py` is the same as a file, for launchers that take no module (slurm's).
"""

from kto_dist.commands.entry import script

if __name__ == "__main__":
    script("train")
