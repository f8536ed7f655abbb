"""`deepspeed [--hostfile H] --module kto_dist.commands.evaluate RUN_OR_MODEL ...`: as `kto-dist evaluate`."""

from kto_dist.commands.entry import script

if __name__ == "__main__":
    script("evaluate")
