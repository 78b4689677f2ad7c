"""The side of `@pytest.mark.npu` that runs the tests: pytest in a process with simulated devices, one per rank."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest

JOB = "SIM_NPU_JOB"
"""The environment variable with the path of the job: {"ports": {node id: port}, "reports": path}."""


class InnerPlugin:
    """Writes a line per report, and gives every test a clean start."""

    def __init__(self, job: str) -> None:
        content = json.loads(Path(job).read_text())
        self._ports: dict[str, int] = content["ports"]
        self._reports = Path(content["reports"])

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """The tests find torch.npu ready."""
        import torch_npu  # noqa: F401

        self._config = session.config

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """A port that no other test has used, and nothing left over for the next test."""
        if "RANK" in os.environ:
            os.environ["MASTER_PORT"] = str(self._ports[item.nodeid])
        result = yield
        _clean_up()
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hand the report over."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._reports.open("a") as file:
            file.write(json.dumps(data, default=str) + "\n")


def _clean_up() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if torch.npu.is_initialized():  # type: ignore[attr-defined]
        torch.npu.set_device(0)  # type: ignore[attr-defined]
