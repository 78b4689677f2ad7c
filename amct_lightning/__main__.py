"""``python -m amct_lightning`` is the command ``amct-lightning``."""

import sys

from amct_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
