"""`deepspeed [--hostfile H] launch/train.py CONFIG [section.key=value ...]`: every rank runs this file."""

from kto_dist.commands.entry import script

if __name__ == "__main__":
    script("train")
