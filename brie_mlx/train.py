"""`python -m brie_mlx.train`: the same as `brie train`."""

import sys

from brie_mlx.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
