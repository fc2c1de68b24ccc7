"""``python -m deltadecode.evaluation``: ``deltadecode eval`` without an installed package."""

import sys

from deltadecode.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "eval")  # results name the command that made them
    main(sys.argv[1:])
