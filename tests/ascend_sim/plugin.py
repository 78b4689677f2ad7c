"""The pytest plugin behind `@pytest.mark.npu`: marked tests happen in other processes, their reports are shown here.

The other processes run pytest too, on the same tests (`inner.py`). Here a marked test sets up nothing and calls
nothing: it waits for the reports of its phases and puts them in place of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator

import pytest

from tests.ascend_sim.equipment import UnavailableError, prepare
from tests.ascend_sim.group import Group
from tests.ascend_sim.inner import JOB, InnerPlugin
from tests.ascend_sim.inner_run import Settings
from tests.ascend_sim.processes import RankResult, npu_run

# Time to start the other process, and to hear of the timeout that ended the test there.
_MARGIN = 30.0
_MARK = "npu(devices=2, nproc=1, env=None, fresh=False): run the test on simulated NPUs, in another process"


def pytest_configure(config: pytest.Config) -> None:
    """Take the side that this process is on."""
    config.addinivalue_line("markers", _MARK)
    inside = JOB in os.environ
    config.pluginmanager.register(InnerPlugin(os.environ[JOB]) if inside else OuterPlugin(), "ascend_sim")


@pytest.fixture(name="npu_run")
def npu_run_fixture() -> Callable[..., list[RankResult]]:
    """`tests.ascend_sim.npu_run`; the test is skipped where the simulated machine cannot be set up."""
    require()
    return npu_run


def require() -> None:
    """Skip the test where the simulated machine cannot be set up; with CI=true that is a failure."""
    try:
        prepare()
    except UnavailableError as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"CI=true and no simulated NPUs: {error}", pytrace=False)
        pytest.skip(f"no simulated NPUs: {error}")


class OuterPlugin:
    """Replaces the phases of the marked tests."""

    def __init__(self) -> None:
        self._groups: dict[Settings, Group] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Sort the marked tests that were selected into groups that share their processes."""
        for item in session.items:
            settings = Settings.of(item)
            if settings is not None:
                group = self._groups.setdefault(settings, Group(settings, session.config))
                group.add(item)
                _detach(item, group)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show the report from the other process, unless something happened to the waiting itself."""
        report = yield
        settings = Settings.of(item)
        if settings is None or call.excinfo is not None:
            return report
        return self._groups[settings].report(item.nodeid, call.when) or report

    def pytest_sessionfinish(self) -> None:
        """Leave no process behind."""
        for group in self._groups.values():
            group.stop()


def _wait_longer(item: pytest.Item) -> None:
    """The timeout here is a second one, for a process that does not even notice its own."""
    mark = item.get_closest_marker("timeout")
    seconds = mark.args[0] if mark is not None and mark.args else item.config.getini("timeout")
    if seconds and float(seconds) > 0:
        item.add_marker(pytest.mark.timeout(float(seconds) + _MARGIN), append=False)


def _detach(item: pytest.Item, group: Group) -> None:
    """Let every phase of the test wait for the same phase in the other process, where its timeout counts."""
    _wait_longer(item)

    def phase(when: str) -> Callable[[], None]:
        return lambda: group.wait(item.nodeid, when)

    def setup() -> None:
        require()
        group.wait(item.nodeid, "setup")

    item.setup, item.runtest, item.teardown = setup, phase("call"), phase("teardown")  # type: ignore[method-assign]
