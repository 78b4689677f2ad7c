"""The examples for Ascend NPUs on simulated ones, with fewer cards than they are written for."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amct_lightning import QuantRecord
from amct_lightning.ascend import NPUUnavailableError
from amct_lightning.cli import main
from tests.ascend.cluster.tables import table
from tests.ascend_sim import RankResult, npu_environment
from tests.ascend_sim.plugin import require
from tests.ascend_sim.processes import end, free_ports, start
from tests.documentation.test_readme import README, Document
from tests.examples.running import EXAMPLES

FOLDER = EXAMPLES / "ascend"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "network.py")
CONFIGS = sorted(FOLDER.glob("*.yaml"))
# Several commands in one process: starting one for each would take most of the time.
DRIVER = """
import json, runpy, sys
from pathlib import Path
from amct_lightning.cli import main

commands = json.loads(sys.argv[1])
sys.path.insert(0, "")
for program, *arguments in commands:
    if program == "python":
        sys.argv, sys.path[1] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        assert main(["fit", *arguments]) == 0
"""
Command = list[str]
NpuRun = Callable[..., list[RankResult]]


def script(name: str, *arguments: str) -> Command:
    return ["python", str(FOLDER / f"{name}.py"), "--epochs", "2", *arguments]


def config(name: str, *arguments: str) -> Command:
    return ["amct-lightning", "--config", str(FOLDER / f"{name}.yaml"), "--trainer.max_epochs", "2", *arguments]


def driver(folder: Path, *commands: Command) -> list[str]:
    """A script that runs the commands one after another, and its argument."""
    path = folder / "driver.py"
    path.write_text(DRIVER)
    return [str(path), json.dumps(commands)]


def together(folder: Path, commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """Run Python with each of the arguments, all at a time; what they have printed."""
    outputs = [folder / f"output{number}.log" for number in range(len(commands))]
    processes = []
    try:
        for command, environment, output in zip(commands, environments, outputs, strict=True):
            processes.append(start([sys.executable, *command], environment, output, folder))
        for process, output in zip(processes, outputs, strict=True):
            assert process.wait(270) == 0, output.read_text()[-4000:]
    finally:
        for process in processes:
            end(process)
    return [output.read_text() for output in outputs]


def same_record(first: Path, second: Path) -> bool:
    """Whether two runs have left the same record, and it is that of the network."""
    assert list(QuantRecord.load(first / "record.txt"))
    return (first / "record.txt").read_bytes() == (second / "record.txt").read_bytes()


class TestWithoutAnNPU:
    """The examples say what is missing."""

    @pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
    def test_scripts_end_with_what_to_install(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", [str(path)])
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.delitem(sys.modules, "network", raising=False)
        with pytest.raises(NPUUnavailableError, match="pip install torch_npu=="):
            runpy.run_path(str(path), run_name="__main__")

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
    def test_yaml_files_end_with_what_to_install(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("LOCAL_RANK", "RANK_ID", "RANK_SIZE"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "hccl.json").write_text(json.dumps(table(2, 8)))
        monkeypatch.setenv("RANK_TABLE_FILE", str(tmp_path / "hccl.json"))
        monkeypatch.setenv("SERVER_ID", "10.0.0.1")
        assert main(["fit", "--config", str(path)]) == 2
        assert "pip install torch_npu==" in capsys.readouterr().err


def test_every_script_has_a_twin_and_the_readme_names_them_all() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in SCRIPTS:
        assert path.with_suffix(".yaml") in CONFIGS
    for path in [*SCRIPTS, *CONFIGS]:
        assert f"({path.name})" in text


def test_one_card_its_twin_and_the_readme(npu_run: NpuRun, tmp_path: Path) -> None:
    document = README.read_text(encoding="utf-8")
    python, settings = (
        re.search(rf"\[start:npu-{kind}\] -->\n```{kind}\n(.*?)```", document, re.DOTALL) for kind in ("python", "yaml")
    )
    assert python
    assert settings
    assert "devices=8" in python[1]
    (tmp_path / "my_module.py").write_text(Document.read(README).files["my_module.py"])
    (tmp_path / "readme.py").write_text(
        python[1].replace("devices=8", "devices=1").replace("max_epochs=3", "max_epochs=1")
    )
    (tmp_path / "readme.yaml").write_text(settings[1])
    options = ["--trainer.devices", "1", "--trainer.max_epochs", "1", "--quant.record_file", "second.txt"]
    commands = [
        script("one_card"),
        config("one_card"),
        ["python", str(tmp_path / "readme.py")],
        ["amct-lightning", "--config", "readme.yaml", *options],
    ]
    (result,) = npu_run(*driver(tmp_path, *commands), devices=1, cwd=tmp_path)
    runs = tmp_path / "runs"
    (accuracy,) = re.findall(r"Right: (\d+\.\d)%", result.output)
    assert float(accuracy) > 90
    assert same_record(runs / "ascend_one_card", runs / "ascend_one_card_yaml")
    for name in ("record.txt", "second.txt"):
        assert list(QuantRecord.load(tmp_path / name)) == ["net.0", "net.3", "net.7"]
    checkpoint = torch.load(runs / "ascend_one_card" / "int8.ckpt", weights_only=True)  # torch_npu is not there
    assert checkpoint["state_dict"]["net.0.weight"].device.type == "cpu"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all nodes see; later tests compare with what earlier ones have left there."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def on_one_server(shared: Path) -> dict[str, str]:
    """What the scripts for the cards of a server print, with two cards; both at a time."""
    require()
    names = ["eight_cards", "fsdp"]
    commands = [script(name, "--devices", "2")[1:] for name in names]
    return dict(zip(names, together(shared, commands, [npu_environment(2)] * 2), strict=True))


@pytest.mark.parametrize("name", ["eight_cards", "fsdp"])
def test_lightning_starts_the_processes_of_a_server(on_one_server: dict[str, str], shared: Path, name: str) -> None:
    assert "2 processes are connected over hccl" in on_one_server[name]
    assert on_one_server[name].count("Right: ") == 1
    assert list(QuantRecord.load(shared / "runs" / f"ascend_{name}" / "record.txt"))


def test_a_checkpoint_of_two_cards_is_one_file_without_npu_tensors(on_one_server: dict[str, str], shared: Path) -> None:
    state = torch.load(shared / "runs" / "ascend_eight_cards" / "int8.ckpt", weights_only=True)
    assert len(state["npu_rng_states"]) == 2


def test_torchrun_on_two_nodes_gives_the_records_of_one_node(npu_run: NpuRun, shared: Path) -> None:
    """One card of each node, in one launch: the script, its twin, and the twins of the runs on one node."""
    nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "1")
    commands = [
        script("two_nodes", "--devices", "1"),
        config("two_nodes", *nodes),
        config("eight_cards", *nodes),
        config("fsdp", *nodes),
    ]
    (port,) = free_ports(1)
    rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    # MindCluster's operator sets such a LOCAL_RANK; torchrun replaces it
    environment = npu_environment(1, {"LOCAL_RANK": "0,1"})
    each = [[*launch, "--node-rank", str(node), *driver(shared, *commands)] for node in range(2)]
    first, second = together(shared, each, [environment] * 2)
    assert first.count("Right: ") == 1
    assert "Right: " not in second
    runs = shared / "runs"
    assert same_record(runs / "ascend_two_nodes_yaml", runs / "ascend_two_nodes")
    assert same_record(runs / "ascend_eight_cards_yaml", runs / "ascend_eight_cards")
    assert same_record(runs / "ascend_fsdp_yaml", runs / "ascend_fsdp")


def test_a_rank_table_gives_the_record_of_torchrun_and_the_run_goes_on(npu_run: NpuRun, shared: Path) -> None:
    """The table comes as Kubernetes mounts it, as a symbolic link."""
    content = table(2, 1)
    environments = []
    (port,) = free_ports(1)
    for node, server in enumerate(content["server_list"]):
        server["server_id"] = f"127.0.0.{node + 1}"
        variables = {"RANK_TABLE_FILE": shared / "hccl.json", "XDL_IP": server["server_id"], "MASTER_PORT": port}
        environments.append(npu_environment(1, variables))
    (shared / "data.json").write_text(json.dumps(content))
    (shared / "hccl.json").symlink_to("data.json")
    first = config("rank_table", "--trainer.devices", "1")
    longer = script("two_nodes", "--devices", "1", "--epochs", "3")  # goes on with what torchrun has trained
    outputs = together(shared, [driver(shared, first, longer)] * 2, environments)
    assert same_record(shared / "runs" / "ascend_rank_table", shared / "runs" / "ascend_two_nodes_yaml")
    assert "Restored all states from the checkpoint" in outputs[0]
    last = torch.load(shared / "runs" / "ascend_two_nodes" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (2, 75)
