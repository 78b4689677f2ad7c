"""Everything that must be there before a simulated device can be used: the wheel, the libraries, the operator list."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.ascend_sim import build
from tests.ascend_sim.cache import ROOT, cached

TORCH_NPU = "2.13.0"
_LIST_OPERATORS = """
import sys, torch, torch_npu
names = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
open(sys.argv[1], "w").write("\\n".join(sorted(names)))
"""


class UnavailableError(RuntimeError):
    """The simulated machine cannot be set up here; the text says what is missing."""


@dataclass(frozen=True)
class Equipment:
    """Where the parts of the simulated machine are."""

    site: Path
    """The folder with the package torch_npu, for sys.path."""
    libraries: Path
    """The folder with the simulated runtime and its kernels."""

    @property
    def bootstrap(self) -> Path:
        """The folder whose sitecustomize connects the two."""
        return ROOT / "tests" / "ascend_sim" / "bootstrap"


def prepare() -> Equipment:
    """Fetch and build what is not in the cache yet; what is missing is looked for once per process.

    Raises:
        UnavailableError: Something is missing.
    """
    outcome = _outcome()
    if isinstance(outcome, UnavailableError):
        raise outcome
    return outcome


@functools.cache
def _outcome() -> Equipment | UnavailableError:
    try:
        return _prepare()
    except UnavailableError as error:
        return error


def _prepare() -> Equipment:
    for program in ("gcc", "g++", "nm"):
        if shutil.which(program) is None:
            raise UnavailableError(f"the simulated Ascend runtime is built with {program}, which was not found")
    torch_version = version("torch").partition("+")[0]
    if torch_version != TORCH_NPU:
        raise UnavailableError(
            f"torch_npu {TORCH_NPU} belongs to torch {TORCH_NPU}, and torch {torch_version} is installed"
        )
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    site = cached(f"torch_npu-{TORCH_NPU}-{python}", _fetch)
    libraries = cached(_fingerprint(python), lambda folder: _make_libraries(site, folder))
    return Equipment(site, libraries)


def native_operators() -> set[str]:
    """The operators with a device kernel of torch_npu's own, such as `aten::add.Tensor`."""
    return set((prepare().libraries / "native_operators.txt").read_text().split())


def _fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--target", str(folder), f"torch_npu=={TORCH_NPU}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(
            f"the wheel torch_npu=={TORCH_NPU} could not be fetched. It takes a network connection once, or "
            f"PIP_FIND_LINKS with a folder that holds the wheel. pip said: {done.stderr.strip()[-600:]}"
        )


def _fingerprint(python: str) -> str:
    digest = hashlib.sha256()
    for path in [Path(build.__file__), Path(__file__), *sorted(build.SOURCES.iterdir())]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for compiler in ("gcc", "g++"):
        digest.update(subprocess.run([compiler, "-v"], capture_output=True, check=True).stderr)
    digest.update(f"{python} {version('torch')} {TORCH_NPU}".encode())
    return f"libraries-{digest.hexdigest()[:16]}"


def _make_libraries(site: Path, folder: Path) -> None:
    from tests.ascend_sim.environment import environment_of

    try:
        build.build(site / "torch_npu", folder)
    except build.BuildError as error:
        raise UnavailableError(f"the simulated Ascend runtime could not be built: {error}") from error
    environment = environment_of(Equipment(site, folder), 1) | {"SIM_NPU_KERNELS": "0"}
    command = [sys.executable, "-c", _LIST_OPERATORS, str(folder / "native_operators.txt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"torch_npu does not start on the simulated runtime: {done.stderr[-2000:]}")
