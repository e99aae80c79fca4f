"""`python -m transformer_annotated` is the command line."""

import sys

from transformer_annotated.cli import main

if __name__ == "__main__":
    sys.exit(main())
