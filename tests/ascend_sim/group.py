"""The tests that share their processes: starts these, collects their reports, and survives their end."""

from __future__ import annotations

import pytest

from tests.ascend_sim.inner_run import Run, Settings


class Group:
    """Runs its tests, in order, on every rank; they run on while the reports of the first are already shown."""

    def __init__(self, settings: Settings, config: pytest.Config) -> None:
        self._locations: dict[str, tuple[str, int | None, str]] = {}
        self._settings = settings
        self._config = config
        self._reports: dict[tuple[str, str], pytest.TestReport] = {}
        self._given_up: set[str] = set()
        self._broken: str | None = None
        self._run: Run | None = None

    def add(self, item: pytest.Item) -> None:
        """The test belongs to this group."""
        self._locations[item.nodeid] = item.location

    def wait(self, node_id: str, when: str) -> None:
        """Return once the report of this phase is there, or will never be."""
        never_started = when != "setup" and (node_id, "setup") not in self._reports
        if never_started or node_id in self._given_up:
            return
        try:
            report = self._next(node_id, when)
        except BaseException:  # the timeout of this test, or an interrupt
            self._give_up(node_id)
            raise
        self._reports[node_id, when] = report

    def report(self, node_id: str, when: str) -> pytest.TestReport | None:
        """The report of a phase, if it was waited for."""
        return self._reports.get((node_id, when))

    def stop(self) -> None:
        """End the processes; the next test that is waited for starts new ones."""
        if self._run is not None:
            self._run.stop()
            self._run = None

    def _next(self, node_id: str, when: str) -> pytest.TestReport:
        if self._broken is not None:
            return self._failed(node_id, when, self._broken)
        if self._run is None:
            node_ids = list(self._locations)
            self._run = Run(self._settings, self._config, node_ids[node_ids.index(node_id) :])
        run = self._run
        report = run.wait(node_id, when)
        if report is None:
            reason = run.last_words()
            self._broken = reason if run.is_silent() else None
            report = self._failed(node_id, when, reason)
        if report.failed and (self._settings.nproc > 1 or run.has_ended()):
            self._give_up(node_id)
        return report

    def _give_up(self, node_id: str) -> None:
        """Nothing more is expected of this test: its process is gone, or its ranks do different things now."""
        self._given_up.add(node_id)
        self.stop()

    def _failed(self, node_id: str, when: str, text: str) -> pytest.TestReport:
        return pytest.TestReport(node_id, self._locations[node_id], {}, "failed", text, when)  # type: ignore[arg-type]
