"""`python -m brie_mlx.generate --prompt TEXT`: the same as `brie generate`."""

import sys

from brie_mlx.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
