"""A rank that is gone: the others end with an error that names it, the files are whole, and the job goes on from them.

Where "blind" is written, collectives behave as on a real machine: they wait for a dead rank, and say nothing.
"""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from amct_lightning.ascend.processes.peers import connect_peers
from tests.ascend.processes.launching import TORCHRUN, Ended, check_files, losses, run_job, script

BLIND = {"SIM_HCCL_BLIND": 1, "SIM_HCCL_TIMEOUT": 600}
# after the first epoch, which has 4 steps per rank
KILL_0, KILL_1 = ["kill", 0, 5], ["kill", 1, 5]

Jobs = Callable[[str], tuple[Path, Ended]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs at once: most of their time is patience."""
    base = tmp_path_factory.mktemp("jobs")
    planned: dict[str, tuple[dict[str, object], tuple[str, ...], dict[str, Any]]] = {
        "popen": (BLIND, (), {"accident": KILL_1, "workers": 1}),
        "popen, main process": (BLIND, (), {"accident": KILL_0}),
        "spawn": (BLIND, (), {"accident": KILL_1, "start_method": "spawn"}),
        "torchrun": ({}, TORCHRUN, {"accident": KILL_1}),
        "exception": (BLIND, (), {"accident": ["a bad batch", 1, 5]}),
        "exception, main process": (BLIND, (), {"accident": ["a bad batch", 0, 5]}),
        "Ctrl-C": ({}, (), {"accident": ["Ctrl-C", 0, 5]}),
        "start": ({}, (), {"unable": [1, "the device is busy"]}),
        "start, main process": ({}, (), {"unable": [0, "kill"]}),
        "whole": ({}, (), {}),
    }

    def run(name: str) -> Ended:
        env, launcher, options = planned[name]
        return run_job(script(base / name, *launcher, **options), env=env)

    with ThreadPoolExecutor(3) as pool:
        ended = dict(zip(planned, pool.map(run, planned), strict=True))
    return lambda name: (base / name, ended[name])


@pytest.mark.parametrize(
    ("name", "lost", "code"),
    [
        ("popen", "Rank 1 .process .* has ended without a word", 1),
        ("popen, main process", "Rank 0 .process .* has ended without a word", -signal.SIGKILL),
        ("spawn", "Rank 1 .process .* was ended by the signal SIGKILL", 1),
        ("torchrun", "Rank 1 .process .* has ended without a word", 1),
        ("exception", "Rank 1 .process .* has failed: ValueError: a bad batch", 1),
        ("exception, main process", "Rank 0 .process .* has failed: ValueError: a bad batch", 1),
        ("Ctrl-C", "Detected KeyboardInterrupt", 1),
    ],
)
def test_the_others_end_and_name_the_rank(npu_run: Any, jobs: Jobs, name: str, lost: str, code: int) -> None:
    folder, job = jobs(name)
    assert re.search(lost, job.output), job.output
    assert (job.returncode, job.left) == (code, []), job.output
    assert "done" not in job.output
    check_files(folder)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 4)


def test_the_error_of_hccl_says_which_rank_is_the_reason(npu_run: Any, jobs: Jobs) -> None:
    _, job = jobs("torchrun")
    assert re.search(r"RuntimeError: (.*\n)+.*Rank 1 \(process \d+ on .*ckpt_path='last'", job.output), job.output


@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [
        (
            "start",
            r"the device is busy(.*\n)*Rank 1 \(.*\) has ended with exit code 1.* All others end too",
            1,
        ),
        ("start, main process", r"The main process .* has ended before all .* Rank 1 ends too", -signal.SIGKILL),
    ],
)
def test_the_others_do_not_wait_for_a_rank_that_never_comes(
    npu_run: Any, jobs: Jobs, name: str, reason: str, code: int
) -> None:
    _, job = jobs(name)
    assert re.search(reason, job.output), job.output
    assert (job.returncode, job.left) == (code, []), job.output


def test_the_job_goes_on_from_its_last_checkpoint_as_if_nothing_had_been(npu_run: Any, jobs: Jobs) -> None:
    folder, _ = jobs("popen")
    reference, whole = jobs("whole")
    assert whole.returncode == 0, whole.output
    again = run_job(script(folder, ckpt_path=str(folder / "last.ckpt")))
    assert (again.returncode, again.left) == (0, []), again.output
    for rank in (0, 1):
        assert losses(folder, rank) == losses(reference, rank)[4:]
    assert (folder / "record.txt").read_bytes() == (reference / "record.txt").read_bytes()
    mine, other = (torch.load(path / "last.ckpt", weights_only=True)["state_dict"] for path in (folder, reference))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_stranger_is_not_taken_for_a_rank() -> None:
    offers: list[Any] = []
    first = connect_peers(0, "127.0.0.1", lambda offer: [offers.append(offer), offer][1])
    odd = (b'{"secret": "\\ud800"}\n', b'{"secret": [[1]]}\n', b"[" * 60000 + b"\n", b"\xff\n", b"9" * 5000 + b"\n")
    words_of_strangers = (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"secret": "x", "name": "Rank 7"}\n',
        b"[]\n",
        b"x" * (1 << 17),
        *odd,
    )
    for words in words_of_strangers:
        with suppress(OSError), socket.create_connection(("127.0.0.1", offers[0][0])) as stranger:
            stranger.sendall(words + b'{"lost": "everybody", "failure": "all"}\n')
    second, third = (connect_peers(rank, "127.0.0.1", lambda _: offers[0]) for rank in (1, 2))
    assert first and second and third
    third.leave()  # is not missed
    second.leave("out of ideas")
    assert first.lost.reported.wait(60)
    first.leave()
    assert re.fullmatch(r"Rank 1 \(process .*\) has failed: out of ideas", first.lost.message or "")
    assert third.lost.message is None


def test_a_rank_that_cannot_reach_rank_0_trains_without_watching() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.warns(UserWarning, match=rf"Rank 3 is not connected with rank 0 on '127.0.0.1' \(port {port}\)"):
        assert connect_peers(3, "127.0.0.1", lambda _: (port, "secret", "Rank 0")) is None
