"""Two nodes on the loopback with two processes each find each other through a rank table alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.ascend.cluster.tables import SCHEDULER_VARIABLES, table, write

# Nodes are forked so that the libraries are imported once. A node starts the process for its second device as
# Lightning does, with LOCAL_RANK; all else follows from the table.
SCRIPT = """
import os, sys
import torch
from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment

def start(function, **variables):
    child = os.fork()
    if not child:
        os.environ.update(variables)
        status = 1
        try:
            status = function()
        finally:
            os._exit(status)
    return child

def failed(children):
    return int(any([os.waitpid(child, 0)[1] for child in children]))

def process():
    environment = AscendClusterEnvironment(host_names=["worker"])
    children = []
    if not environment.creates_processes_externally:
        for rank in range(1, len(environment.local_devices)):
            children.append(start(process, LOCAL_RANK=str(rank)))
    rank = environment.global_rank()
    method = f"tcp://{environment.main_address}:{environment.main_port}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=environment.world_size())
    total = torch.tensor(10**rank)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    with open(os.path.join(sys.path[0], f"rank{rank}.txt"), "w") as file:
        file.write(f"{environment.node_rank()} {environment.local_rank()} {rank} {total.item()}")
    return failed(children)

sys.exit(failed([start(process, XDL_IP=f"127.0.0.{node}") for node in (1, 2)]))
"""


def test_an_all_reduce_over_two_nodes_reaches_every_process(tmp_path: Path) -> None:
    content = table()
    for node, server in enumerate(content["server_list"]):
        server["server_id"] = f"127.0.0.{node + 1}"
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    variables = {name: value for name, value in os.environ.items() if name not in SCHEDULER_VARIABLES}
    variables |= {"RANK_TABLE_FILE": write(tmp_path, content), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    variables["PYTHONPATH"] = str(Path(__file__).parents[3])
    assert subprocess.run([sys.executable, str(script)], env=variables, timeout=120, check=False).returncode == 0
    lines = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(4)]
    assert lines == ["0 0 0 1111", "0 1 1 1111", "1 0 2 1111", "1 1 3 1111"]
