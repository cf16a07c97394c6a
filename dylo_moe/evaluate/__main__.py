"""python -m dylo_moe.evaluate; see --help."""

import sys

from dylo_moe.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
