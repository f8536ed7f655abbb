"""`deepspeed [--hostfile H] --module kto_dist.commands.precompute CONFIG [section.key=value ...]`: as `train`."""

from kto_dist.commands.entry import script

if __name__ == "__main__":
    script("precompute")
