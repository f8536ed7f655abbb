"""`make compare`: the demo's model, unpacked once, and `kto-dist compare` on the demo's thumbs."""

import sys
from pathlib import Path

from run import unpack

from kto_dist.commands.cli import main

if __name__ == "__main__":
    folder = Path(__file__).parent
    unpack(Path("runs/demo/model"))
    main(["compare", str(folder / "compare.yaml"), *sys.argv[1:]])
