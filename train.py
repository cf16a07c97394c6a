"""The command `dylo-moe-train` as a file, which launchers of several processes name (docs/scaling.md)."""

import sys

from dylo_moe.training.command import main

if __name__ == "__main__":
    sys.exit(main())
