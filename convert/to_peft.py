"""`python convert/to_peft.py runs/NAME/checkpoint-290 OUT`: the same as `brie export peft`."""

import sys

from brie_mlx.cli import main

if __name__ == "__main__":
    main(["export", "peft", *sys.argv[1:]])
