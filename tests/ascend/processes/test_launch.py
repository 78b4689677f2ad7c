"""How the processes of a run start: by the strategy, torchrun, SLURM or a scheduler with a rank table."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from amct_lightning.ascend import AscendClusterEnvironment, AscendStrategy
from tests.ascend.cluster.tables import SCHEDULER_VARIABLES, table, write
from tests.ascend.processes.launched import train
from tests.ascend.processes.launching import TORCHRUN, Ended, check_files, losses, run_job, script
from tests.ascend.training import NPU, Net, fit, loader, make_trainer
from tests.ascend_sim.processes import free_ports

# Tests that fork; none of them uses a device in the process that all share.
unused_devices = pytest.mark.npu(devices=4)

Started = Callable[[str], tuple[Path, Ended]]
ELASTIC = {"TORCHELASTIC_RUN_ID": "job", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
SLURM = {
    **{"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    **{"SLURM_NODEID": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "12345", "SLURM_NODELIST": "worker[1-2]"},
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The same run, started in all ways."""
    folder = tmp_path_factory.mktemp("started")
    commands = {
        "popen": script(folder / "popen"),
        "spawn": script(folder / "spawn", start_method="spawn"),
        "fork": script(folder / "fork", start_method="fork"),
        "torchrun": script(folder / "torchrun", *TORCHRUN),
    }
    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(commands, pool.map(run_job, commands.values()), strict=True))
    return lambda method: (folder / method, ended[method])


@pytest.mark.parametrize("method", ["popen", "spawn", "fork", "torchrun"])
def test_every_way_to_start_trains_the_same(npu_run: Callable[..., Any], started: Started, method: str) -> None:
    folder, job = started(method)
    reference, _ = started("popen")
    assert (job.returncode, job.left) == (0, []), job.output
    assert "done" in job.output
    check_files(folder)
    assert (folder / "record.txt").read_bytes() == (reference / "record.txt").read_bytes()
    for rank in (0, 1):
        assert len(losses(folder, rank)) == 8
        assert losses(folder, rank) == losses(reference, rank)
    assert losses(folder, 0) != losses(folder, 1)  # the data was split
    mine, other = (torch.load(path / "last.ckpt", weights_only=True)["state_dict"] for path in (folder, reference))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert not torch.equal(mine["net.4.weight"], Net().state_dict()["net.4.weight"])


def forked(work: Callable[[], object]) -> int:
    """Start a process that has the libraries already."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def statuses(works: list[Callable[[], object]]) -> list[int]:
    children = [forked(work) for work in works]
    return [os.waitpid(child, 0)[1] for child in children]


def agent(node: int, port: int, folder: Path) -> Callable[[], object]:
    """What the program torchrun does with its command line."""
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=4,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": node, "timeout": 100},
        run_id="job",
        max_restarts=0,
        start_method="fork",
    )
    return lambda: elastic_launch(config, on_eight)(folder)


def scheduled(rank: int, rank_table: str, folder: Path) -> Callable[[], object]:
    """What a scheduler does for every device."""

    def work() -> None:
        os.environ.update(RANK_ID=str(rank), RANK_TABLE_FILE=rank_table, XDL_IP=f"127.0.0.{rank // 4 + 1}")
        on_eight(folder)

    return work


def on_eight(folder: Path) -> None:
    trainer = train(folder, devices=4, num_nodes=2, max_epochs=1)
    environment = trainer.strategy.cluster_environment
    device = trainer.strategy.root_device
    where = f"{environment.node_rank()} {trainer.local_rank} {device} {type(environment).__name__}"
    (folder / f"where-{trainer.global_rank}.txt").write_text(where)


@unused_devices
def test_two_nodes_with_four_devices_each_write_one_record(tmp_path: Path) -> None:
    content = table(2, 4)
    for node, server in enumerate(content["server_list"]):
        server["server_id"] = f"127.0.0.{node + 1}"
    rank_table = write(tmp_path, content)
    elastic, by_table = folders = tmp_path / "torchrun", tmp_path / "table"
    for folder in folders:
        folder.mkdir()
    port = free_ports(1)[0]
    assert statuses([agent(node, port, elastic) for node in range(2)]) == [0] * 2
    assert statuses([scheduled(rank, rank_table, by_table) for rank in range(8)]) == [0] * 8
    for folder, environment in ((elastic, "TorchElasticEnvironment"), (by_table, "AscendClusterEnvironment")):
        check_files(folder)
        assert [path.name for path in folder.glob("record*")] == ["record.txt"]
        for rank in range(8):
            where = (folder / f"where-{rank}.txt").read_text()
            assert where == f"{rank // 4} {rank % 4} npu:{rank % 4} {environment}"
            assert losses(folder, rank) == losses(elastic, rank)
            assert len(losses(folder, rank)) == 1
    assert (elastic / "record.txt").read_bytes() == (by_table / "record.txt").read_bytes()


@unused_devices
def test_two_runs_in_one_folder_leave_whole_files(tmp_path: Path) -> None:
    def run(seed: int) -> Callable[[], object]:
        return lambda: train(tmp_path, devices=1, seed=seed, max_epochs=5)

    assert statuses([run(1), run(2)]) == [0, 0]
    check_files(tmp_path)
    for checkpoint in tmp_path.glob("*.ckpt"):
        assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() >= Net().state_dict().keys()


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets the variables of a scheduler, and no others."""
    for name in (*SCHEDULER_VARIABLES, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def set_variables(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.npu
@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 2)])
def test_devices_that_torchrun_has_no_processes_for_are_refused(
    tmp_path: Path, scheduler: Callable[[dict[str, str]], None], devices: int, nodes: int
) -> None:
    scheduler({**ELASTIC, "RANK": "0", "LOCAL_RANK": "0"})
    trainer = make_trainer(tmp_path, **{**NPU, "devices": devices, "num_nodes": nodes})
    with pytest.raises(
        ValueError, match=rf"devices={devices}.*world size.*2|`devices={devices}`.*2 processes|{devices}"
    ):
        trainer.fit(Net(), loader())


@pytest.mark.npu
def test_torchrun_comes_before_slurm_and_slurm_before_a_rank_table(
    tmp_path: Path, scheduler: Callable[[dict[str, str]], None]
) -> None:
    def chosen(nodes: int) -> Any:
        return make_trainer(tmp_path, **{**NPU, "devices": 2, "num_nodes": nodes}).strategy

    content = table(1, 2)
    scheduler({"RANK_TABLE_FILE": write(tmp_path, content), "RANK_ID": "1", "XDL_IP": "10.0.0.1"})
    strategy = chosen(1)
    assert type(strategy.cluster_environment) is AscendClusterEnvironment
    assert (strategy.global_rank, str(strategy.root_device)) == (1, "npu:1")
    scheduler(SLURM)
    strategy = chosen(2)
    assert type(strategy.cluster_environment) is SLURMEnvironment
    assert (strategy.global_rank, strategy.node_rank, strategy.world_size) == (3, 1, 4)
    assert strategy.cluster_environment.main_address == "worker1"
    assert str(strategy.root_device) == "npu:1"
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 3}
    scheduler(ELASTIC)
    strategy = chosen(1)
    assert type(strategy.cluster_environment) is TorchElasticEnvironment
    assert (strategy.global_rank, strategy.world_size) == (1, 2)


@pytest.mark.npu
def test_other_numbers_than_those_of_slurm_are_refused(
    tmp_path: Path, scheduler: Callable[[dict[str, str]], None]
) -> None:
    scheduler(SLURM)
    trainer = make_trainer(tmp_path, **{**NPU, "devices": 1, "num_nodes": 2})
    with pytest.raises(ValueError, match="--ntasks-per-node"):
        trainer.fit(Net(), loader())


@pytest.mark.npu
def test_a_notebook_trains_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning looks at this once, when it is imported
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    found, trainer = fit(tmp_path, **NPU)
    assert len(found) == 8
    assert trainer.strategy.launcher is None
    fit(tmp_path, **NPU)  # the cell is run again
    with pytest.raises(MisconfigurationException, match="not compatible with an interactive"):
        make_trainer(tmp_path, accelerator="npu", devices=2, strategy=AscendStrategy())
