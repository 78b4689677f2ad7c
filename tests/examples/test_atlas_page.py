"""What the page "Training on Atlas A2/A3" says is so: its error messages, commands and files, in both languages."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.ascend.training import Net, loader, make_trainer
from tests.ascend_sim.processes import free_ports
from tests.documentation.test_docs import DOCS, messages_of_the_package
from tests.documentation.test_readme import CHINESE, LINK, README, ROOT, blocks, without_code

PAGE, TRANSLATION = DOCS / "atlas.md", DOCS / "zh" / "atlas.md"
# What HCCL says on hardware, as its documentation has it; and what takes long: torchrun, and the start of Inductor.
NOT_PROVOKED = {"EI0006", "EI0002", "ChildFailedError", "Device npu not supported"}


def messages(page: Path) -> list[list[str]]:
    """The messages in each table below the heading of the error messages; the last table has those of others."""
    chapters = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[-1]
    tables = re.split(r"^### ", chapters, flags=re.MULTILINE)[1:]
    return [re.findall(r"^\| `(.+?)`", table, flags=re.MULTILINE) for table in tables]


def test_the_messages_of_the_package_exist() -> None:
    *tables, _ = messages(PAGE)
    source = messages_of_the_package()
    assert all(tables)
    for quoted in [message for table in tables for message in table]:
        pattern = re.compile(".*".join(map(re.escape, quoted.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in source), quoted


class OnTheNPU(Dataset[Tensor]):
    """What a worker of a data loader cannot do."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(1, device="npu")


def in_a_new_process(code: str, **variables: str) -> None:
    """Run Python without torch_npu, and raise what it prints if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


def load_an_npu_tensor(folder: Path) -> None:
    torch.save(torch.ones(2, device="npu"), folder / "tensor.pt")
    path = repr(str(folder / "tensor.pt"))
    in_a_new_process(f"import torch; torch.load({path}, map_location='cpu'); torch.load({path})")


def two_listen_on_one_port() -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        dist.TCPStore("127.0.0.1", first.getsockname()[1], is_master=True)


def reduce(tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
    if not dist.is_initialized():
        dist.init_process_group("hccl", init_method=f"tcp://127.0.0.1:{free_ports(1)[0]}", rank=0, world_size=1)
    dist.all_reduce(tensor, op=operation)


@pytest.mark.npu(devices=1)
def test_the_messages_of_others_are_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one: dict[str, Any] = {"accelerator": "npu", "devices": 1}
    monkeypatch.setenv("WORLD_SIZE", "2")
    cases: dict[str, Callable[[], object]] = {
        "No supported gpu": lambda: make_trainer(tmp_path, accelerator="gpu", devices=1),
        "invalid literal": lambda: in_a_new_process("import lightning.fabric", LOCAL_RANK="0,1"),
        "does not match the world size": lambda: TorchElasticEnvironment().validate_settings(2, 2),
        "requires a GPU": lambda: make_trainer(tmp_path, strategy="fsdp", **one),
        "Using a compiled model": lambda: make_trainer(tmp_path, strategy="ascend", **one).fit(
            torch.compile(Net()),  # type: ignore[arg-type]
            loader(),
        ),
        "Cannot re-initialize NPU": lambda: list(DataLoader(OnTheNPU(), num_workers=1, multiprocessing_context="fork")),
        "Only c10": lambda: torch.ones(1, 2, 3, 4, device="npu").to(memory_format=torch.channels_last),
        "NPU out of memory": lambda: torch.empty(2**40, dtype=torch.uint8, device="npu"),
        "HCCL allreduce": lambda: reduce(torch.ones(2, dtype=torch.float64, device="npu")),
        "result type Float": lambda: reduce(torch.ones(2, dtype=torch.int64, device="npu"), dist.ReduceOp.AVG),
        "No backend type": lambda: reduce(torch.ones(2)),
        "don't know how": lambda: load_an_npu_tensor(tmp_path),
        "EADDRINUSE": two_listen_on_one_port,
    }
    torch.ones(1, device="npu")  # a process that has used the NPU, for the workers of the data loader
    quoted = set(messages(PAGE)[-1]) - NOT_PROVOKED
    assert len(quoted) == len(cases)
    for begin, provoke in cases.items():
        (message,) = [text for text in quoted if text.startswith(begin)]
        with pytest.raises(Exception) as caught:
            provoke()
        assert message in str(caught.value)


@pytest.mark.npu(devices=1)
def test_the_command_that_checks_the_set_up_counts_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r'^python -c "(.+)"$', PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    exec(code, {})
    assert capsys.readouterr().out == "1 NPUs\n"


@pytest.mark.npu(devices=1)
def test_what_the_page_says_about_automatic_choices(tmp_path: Path) -> None:
    assert type(make_trainer(tmp_path, accelerator="auto").accelerator).__name__ == "CPUAccelerator"
    kept = pl.Trainer(accelerator="npu", devices=[0], strategy="ascend", logger=False, enable_checkpointing=False)
    assert kept.strategy.root_device == torch.device("npu", 0)


def test_the_files_in_its_commands_are_there() -> None:
    texts = [PAGE, TRANSLATION, README, CHINESE, *(ROOT / "examples" / "ascend").iterdir()]
    for text in [text for text in texts if text.is_file()]:
        for name in re.findall(r"examples/ascend/[\w.]+", text.read_text(encoding="utf-8")):
            assert (ROOT / name.rstrip(".")).exists(), (text, name)


class TestTheChinesePage:
    """It says the same."""

    def test_has_the_same_code(self) -> None:
        assert blocks(TRANSLATION) == blocks(PAGE)

    def test_has_the_same_headings_and_tables(self) -> None:
        def shape(path: Path) -> list[str]:
            return re.findall(r"^ *(#+|\|)", without_code(path), flags=re.MULTILINE)

        assert shape(TRANSLATION) == shape(PAGE)

    def test_explains_the_same_messages(self) -> None:
        assert messages(TRANSLATION) == messages(PAGE)

    def test_has_the_same_links(self) -> None:
        def links(path: Path) -> list[str]:
            found = [link.partition("#")[0] for link in LINK.findall(without_code(path))]
            return [link.removeprefix("../") for link in found if link]

        assert links(TRANSLATION) == links(PAGE)
