"""``python -m deltadecode.evaluation``: ``deltadecode eval`` without an installed package."""

import sys

from deltadecode.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
