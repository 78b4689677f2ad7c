"""The folder that compiled kernels are kept in, from one run to the next."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``AMCT_LIGHTNING_CACHE``, or a folder in the user's cache.

    It is another one for another version of torch and another kind of CPU: kernels use every instruction of the one
    that they are compiled on, and a home folder may be shared by several.
    """
    root = os.environ.get("AMCT_LIGHTNING_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amct_lightning"
    return base / "kernels" / _machine()


def digest_of(*parts: object) -> str:
    """Return a short name for what a kernel depends on.

    Args:
        parts: Texts, numbers or anything else whose ``repr`` tells it from others.
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cached(path: Path, compile: Callable[[Path], None]) -> Path:
    """Return a file of the folder, which is there as it was written or is made now.

    Args:
        path: The file.
        compile: Makes it, at the path that it is given; whatever it raises is raised.
    """
    if not _is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{path}.lock"):  # other processes of the same training wait for it
            if not _is_whole(path):
                sys.stderr.write(f"Compiling quantization kernels, once for this machine: {path}\n")
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    made, digest = Path(folder) / path.name, Path(folder) / "digest"
                    compile(made)
                    digest.write_text(_digest(made), encoding="ascii")
                    made.replace(path)
                    digest.replace(_digest_file(path))  # the last, so that what is half done is done again
    return path


def _is_whole(path: Path) -> bool:
    """Tell whether a file is there and is what was written: a damaged one could end the process that runs it."""
    try:
        return _digest_file(path).read_text(encoding="ascii") == _digest(path)
    except (FileNotFoundError, ValueError):
        return False


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return digest_of(torch.__version__, capability, platform.machine(), _cpu(), _gpu())


def _cpu() -> str:
    """Return what instructions the CPU has, as far as the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
