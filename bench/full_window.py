"""Train one window at the full depth with each system, once: what `training.py` measures, in the shortest form.

python bench/full_window.py
"""

import sys

from training import main

if __name__ == "__main__":
    main(["--windows", "2", "--repeats", "1", *sys.argv[1:]])
