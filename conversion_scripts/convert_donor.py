"""Convert one `.pt` file of decoder layers into a donor repo: `transplant-hf convert` as a script."""

from __future__ import annotations

import sys

from transplant_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
