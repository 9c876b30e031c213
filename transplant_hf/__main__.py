"""`python -m transplant_hf` is the command `transplant-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
