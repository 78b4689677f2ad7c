"""Runs the numeric part of the suite as on other CPUs: ``python -m tests.capabilities [LEVEL ...]``, `make test-cpu`.

A level limits the vector instructions of the three libraries that add floats: torch itself, oneDNN and MKL. Sums are
then made in the order of a CPU that has no others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import torch

NUMERIC = ["tests/test_golden_models.py", "tests/test_migrate.py", "tests/test_migrate_states.py", "tests/test_sums.py"]
NUMERIC += ["tests/quantizers", "tests/modules"]
"""The tests that compare numbers with recorded ones, or with formulas written down a second time."""

LEVELS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "native": {},
}
"""Level -> the environment variables that limit a process to it; they are read when torch is imported."""


def available() -> list[str]:
    """Levels that this CPU can run, each different from the others."""
    own = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ["native", "default", "avx2"], "AVX2": ["native", "default"]}.get(own, ["native"])


def main(chosen: list[str]) -> int:
    """Run the numeric tests at each of the levels; return the number of levels that failed."""
    unknown = [level for level in chosen if level not in LEVELS]
    if unknown:
        sys.exit(f"unknown level: {', '.join(unknown)}; there are {', '.join(LEVELS)}")
    levels = [level for level in available() if level in chosen or not chosen]
    left_out = [level for level in chosen if level not in levels]
    if left_out:
        own = torch.backends.cpu.get_cpu_capability()
        print(f"left out: {', '.join(left_out)}. This CPU's own capability is {own}; run 'native'.")
    failed = []
    for number, level in enumerate(levels, 1):
        print(f"\n== {number} of {len(levels)}: numeric tests at CPU capability '{level}', 2 to 6 minutes", flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "--numprocesses", "auto", "--dist", "loadfile", *NUMERIC]
        with tempfile.TemporaryDirectory() as cache:  # Inductor's own would give this level the loops of another one
            env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache, **LEVELS[level]}
            if subprocess.run(command, env=env, check=False).returncode:
                failed.append(level)
        print(f"== {level}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"passed at: {', '.join(levels)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
