"""One start of the processes behind marked tests: pytest on the same tests, on every rank, and its reports."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ascend_sim.environment import npu_environment
from tests.ascend_sim.inner import JOB
from tests.ascend_sim.processes import Process, end, free_ports, rank_variables, start

_POLL = 0.02
# How long the other ranks get to report after one has failed: they may be waiting for it in a collective.
_GRACE = 5.0


@dataclass(frozen=True)
class Settings:
    """What the tests of a group have in common."""

    file: Path
    devices: int
    nproc: int
    env: tuple[tuple[str, str], ...]
    alone: str
    """The node id of a test with `fresh=True`."""

    @classmethod
    def of(cls, item: pytest.Item) -> Settings | None:
        """The settings that the test's mark asks for; None without a mark."""
        mark = item.get_closest_marker("npu")
        return None if mark is None else cls._checked(item, *mark.args, **mark.kwargs)

    @classmethod
    def _checked(
        cls,
        item: pytest.Item,
        *,
        devices: int = 2,
        nproc: int = 1,
        env: Mapping[str, object] | None = None,
        fresh: bool = False,
    ) -> Settings:
        variables = tuple(sorted((name, str(value)) for name, value in (env or {}).items()))
        return cls(item.path, devices, nproc, variables, item.nodeid if fresh else "")


class Run:
    """The processes of one group, from start to stop.

    The reports come through files: a pipe would fill up and stop a rank in the middle of a collective while the other
    side is busy with tests of its own.
    """

    def __init__(self, settings: Settings, config: pytest.Config, node_ids: list[str]) -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="npu_tests-")
        self._ranks: list[_Rank] = []
        ports = dict(zip(node_ids, free_ports(len(node_ids)), strict=True)) if settings.nproc > 1 else {}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(config.rootpath),
            *node_ids,
        ]
        for rank in range(settings.nproc):
            folder = Path(self._folder.name) / str(rank)
            folder.mkdir()
            (folder / "job.json").write_text(json.dumps({"ports": ports, "reports": str(folder / "reports")}))
            variables = rank_variables(rank, settings.nproc, 0) | dict(settings.env) | {JOB: folder / "job.json"}
            environment = npu_environment(settings.devices, variables)
            self._ranks.append(_Rank(start(command, environment, folder / "output", config.rootpath), folder))

    def wait(self, node_id: str, when: str) -> pytest.TestReport | None:
        """The report of a phase, all ranks taken together; None where the processes end without one."""
        patience = float("inf")
        while True:
            ended = self.has_ended()  # asked first: what was written before the end is then read
            reports = [rank.report(node_id, when) for rank in self._ranks]
            missing = [rank for rank, report in zip(self._ranks, reports, strict=True) if report is None]
            failed = any(report is not None and report["outcome"] == "failed" for report in reports)
            if not missing or time.monotonic() > patience or all(rank.process.poll() is not None for rank in missing):
                return self._together(reports) if failed or not missing or not ended else None
            if (failed or ended) and patience == float("inf"):
                patience = time.monotonic() + _GRACE
            time.sleep(_POLL)

    def has_ended(self) -> bool:
        """Whether a rank has ended."""
        return any(rank.process.poll() is not None for rank in self._ranks)

    def is_silent(self) -> bool:
        """Whether a rank ended without a single report: it could not even start the tests."""
        return any(rank.process.poll() is not None and not rank.reports for rank in self._ranks)

    def last_words(self) -> str:
        """What the ranks that ended have said."""
        ended = [(number, rank) for number, rank in enumerate(self._ranks) if rank.process.poll() is not None]
        return "\n".join(
            f"The process of rank {number} ended with {rank.process.returncode} before the test did.\n{rank.output()}"
            for number, rank in ended
        )

    def stop(self) -> None:
        """End all processes and forget their files."""
        for rank in self._ranks:
            end(rank.process)
        self._folder.cleanup()

    def _together(self, reports: list[dict[str, object] | None]) -> pytest.TestReport:
        """The report of the first rank that failed, or else of rank 0."""
        there = [(rank, report) for rank, report in enumerate(reports) if report is not None]
        rank, chosen = next((pair for pair in there if pair[1]["outcome"] == "failed"), there[0])
        report: pytest.TestReport = self._config.hook.pytest_report_from_serializable(
            config=self._config, data=dict(chosen)
        )
        if isinstance(report.longrepr, list):  # the place and reason of a skip; JSON knows no tuples
            report.longrepr = tuple(report.longrepr)
        if len(reports) > 1 and report.failed:
            report.sections.insert(0, ("rank", f"This is what happened on rank {rank} of {len(reports)}."))
        return report


class _Rank:
    """One process and what it has reported so far."""

    def __init__(self, process: Process, folder: Path) -> None:
        self.process = process
        self.reports: dict[tuple[str, str], dict[str, object]] = {}
        self._folder = folder
        self._read = 0

    def report(self, node_id: str, when: str) -> dict[str, object] | None:
        self._read_on()
        return self.reports.get((node_id, when))

    def output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")[-6000:]

    def _read_on(self) -> None:
        path = self._folder / "reports"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in complete.splitlines():
            report = json.loads(line)
            self.reports[report["nodeid"], report["when"]] = report
