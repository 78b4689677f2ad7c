"""Finding the files of the newest run in a folder, which may hold several runs, and resumptions of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from amct_lightning.wording import cut_off

_VERSION = re.compile(r"version_(\d+)")

StepsOf = Callable[[Path], Sequence[int]]
"""Gives all steps that the log files in a folder have, ascending."""


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort files by the time of their last change; of equally old ones, ``last.ckpt`` comes first, then by name."""
    return sorted(paths, key=lambda path: (-path.stat().st_mtime_ns, path.stem != "last", str(path)))


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """Return the files in a folder and below that fit one of the patterns, newest first.

    Args:
        folder: The folder.
        patterns: Names with wildcards.
    """
    return newest_first({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})


def choose_log_folders(found: Sequence[Path], steps_of: StepsOf, notes: list[str]) -> list[Path]:
    """Return the log folders of the newest run: that run's first, then those of its resumptions.

    Folders ``version_0``, ``version_1``, ... beside each other are either runs of their own or resumptions of the one
    before. A run of its own begins to log within one interval from step 0, a resumption later.

    Args:
        found: All log folders, newest first.
        steps_of: Gives the steps in a log folder.
        notes: Takes a line about runs that were left out.

    Returns:
        The folders.
    """
    if not found:
        return []
    family = _family(found[0])
    versions = sorted((path for path in found if _family(path) == family), key=_version)
    chosen = _newest_chain(versions, steps_of)
    left_out = [str(path) for path in sorted(found) if path not in chosen and steps_of(path)]
    if left_out:
        notes.append(
            f"The curves are those of the newest run, {', '.join(map(str, chosen))}. Left out: {cut_off(left_out)}; "
            "give the folder of one of these to see it."
        )
    return chosen


def _newest_chain(versions: list[Path], steps_of: StepsOf) -> list[Path]:
    """Take the newest version that holds more than one step, and what it goes on from."""
    with_steps = [(path, steps_of(path)) for path in versions]
    logged = [(path, steps) for path, steps in with_steps if steps]
    # A lone step is what `trainer.test` logs; it must not hide the training before it.
    trained = [place for place, (_, steps) in enumerate(logged) if len(steps) > 1]
    if not trained:
        return [path for path, _ in logged[-1:]] or versions[-1:]
    chain = [logged[trained[-1]]]
    for path, steps in reversed(logged[: trained[-1]]):
        if _begins_at_zero(chain[0][1]):
            break
        if steps[0] < chain[0][1][0] and len(steps) > 1:
            chain.insert(0, (path, steps))
    return [path for path, _ in chain]


def _begins_at_zero(steps: Sequence[int]) -> bool:
    return steps[0] <= max(later - earlier for earlier, later in pairwise(steps))


def _family(log_folder: Path) -> Path:
    """Return what the versions of one run have in common."""
    return log_folder.parent if _VERSION.fullmatch(log_folder.name) else log_folder


def _version(log_folder: Path) -> int:
    match = _VERSION.fullmatch(log_folder.name)
    return int(match[1]) if match else -1
