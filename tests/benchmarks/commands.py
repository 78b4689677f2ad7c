"""What a command costs before it does anything: ``python -m tests.benchmarks.commands [OTHER_CHECKOUT ...]``.

Each command runs in new processes, of this checkout and of the others in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from amct_lightning.record import LayerRecord, QuantRecord

ROUNDS = 5
COMMANDS = ("--help", "record show record.txt", "config --format xml", "fit --help")


def cost(checkout: Path, folder: str, command: str) -> tuple[float, float, float]:
    """Run a command; return its seconds, those of the processor, and MiB of memory at most."""
    start = time.perf_counter()
    running = subprocess.Popen(
        [sys.executable, "-m", "amct_lightning", *command.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, running.returncode, used = os.wait4(running.pid, 0)
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    checkouts = [Path(__file__).parents[2], *(Path(other).resolve() for other in sys.argv[1:])]
    layer = LayerRecord(scale_d=0.5, offset_d=0, scale_w=[0.1], offset_w=[0])
    with tempfile.TemporaryDirectory() as folder:
        QuantRecord({"fc": layer}).save(Path(folder, "record.txt"))
        for command in COMMANDS:
            rounds = [[cost(checkout, folder, command) for checkout in checkouts] for _ in range(ROUNDS)]
            for number, checkout in enumerate(checkouts):
                wall, cpu, memory = (median(one[number][of] for one in rounds) for of in range(3))
                print(f"{command:24} {wall:6.2f} s  {cpu:6.2f} s CPU  {memory:5.0f} MiB  {checkout}", flush=True)


if __name__ == "__main__":
    main()
