"""The program of one rank of npu_run: calls the function that the job names and writes down what it returned."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from pathlib import Path


def main(folder: Path, rank: str) -> int:
    """Run the job of `folder`; the answer is (value, traceback)."""
    job = pickle.loads((folder / "job").read_bytes())
    value, error = None, None
    try:
        import torch_npu  # noqa: F401

        function = importlib.import_module(job["module"])
        for name in job["name"].split("."):
            function = getattr(function, name)
        value = function(*job["args"])
    except Exception:
        error = traceback.format_exc()
        print(error, file=sys.stderr, flush=True)
    part = folder / f"answer-{rank}.part"
    part.write_bytes(pickle.dumps((value, error)))
    part.rename(folder / f"answer-{rank}")
    sys.stdout.flush()
    return 1 if error else 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2])
    if code:  # a failed rank does not wait for the others in the clean-up of its communicators
        os._exit(code)
