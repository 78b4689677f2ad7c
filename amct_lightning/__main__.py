"""``python -m amct_lightning`` is the command ``amct-lightning``."""

import os
import sys

if __name__ == "__main__":
    if sys.argv[1:2] in (["record"], ["report"]):
        # Python looks for modules in the current folder first, where a file may lie that is called as a library is.
        sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]  # noqa: PTH109  (a pathlib.py may lie there)

    from amct_lightning.cli import main

    sys.exit(main())
