"""Finding the files of the newest run in a folder, which may hold several runs, and resumptions of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from amct_lightning.run_report.logs import EVENT_FILES, METRICS_FILE, Columns
from amct_lightning.wording import cut_off

_VERSION = re.compile(r"version_(\d+)")
_AT_ONCE = 60.0  # seconds between the last writing of two loggers of one Trainer

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


def find_log_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder and below that loggers have written metrics to, newest first.

    Args:
        folder: The folder.
    """
    places = list(dict.fromkeys(path.parent for path in find_files(folder, METRICS_FILE, EVENT_FILES)))
    # A metric with several values makes TensorBoard write folders below its own.
    parts = {place for place in places if any(above in places for above in place.parents)}
    return [place for place in places if place not in parts or (place / METRICS_FILE).exists()]


def same_runs(metrics: Mapping[Path, Columns]) -> dict[Path, list[Path]]:
    """Find the folders that several loggers of one Trainer wrote to: they hold the same values.

    Args:
        metrics: Folder -> what was logged there, newest first.

    Returns:
        For each run a folder -> all of its folders, that one first. With ``metrics.csv``, which is more exact, before
        others.
    """
    found: dict[Path, list[Path]] = {}
    for place in sorted(metrics, key=lambda place: not (place / METRICS_FILE).exists()):
        first = next((other for other in found if _is_same_run(other, place, metrics)), place)
        found.setdefault(first, []).append(place)
    order = list(metrics)
    return dict(sorted(found.items(), key=lambda item: min(map(order.index, item[1]))))


def _is_same_run(one: Path, other: Path, metrics: Mapping[Path, Columns]) -> bool:
    mine, theirs = metrics[one], metrics[other]
    names = [name for name in mine if name in theirs and name != "epoch"]
    is_alike = (one / METRICS_FILE).exists() == (other / METRICS_FILE).exists()
    if is_alike and abs(_changed(one) - _changed(other)) > _AT_ONCE:
        return False  # the same training twice gives the same values, too
    for name in names:
        steps = mine[name].keys() & theirs[name].keys()
        # Of a run that was killed one logger may have kept less than the other.
        if not steps or (is_alike and mine[name].keys() != theirs[name].keys()):
            return False
        if not all(_is_float32_of(mine[name][step], theirs[name][step]) for step in steps):
            return False
    return bool(names)


def _changed(log_folder: Path) -> float:
    return max(path.stat().st_mtime for pattern in (METRICS_FILE, EVENT_FILES) for path in log_folder.glob(pattern))


def _is_float32_of(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=2**-23, abs_tol=2**-126) or (math.isnan(one) and math.isnan(other))


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
