"""The hccl backend on two ranks: values, DDP, and what happens when ranks disagree."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.ascend_sim.networks import NETWORKS

pytestmark = pytest.mark.npu(nproc=2)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8]


@pytest.fixture
def rank() -> Iterator[int]:
    rank = int(os.environ["RANK"])
    torch.npu.set_device(rank)
    dist.init_process_group("cpu:gloo,npu:hccl")
    yield rank
    dist.destroy_process_group()


def _full(value: float, dtype: torch.dtype = torch.float32, size: int = 5) -> Tensor:
    return torch.full((size,), value, device="npu").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_of_every_type(rank: int, dtype: torch.dtype) -> None:
    total, sent = _full(rank + 1, dtype), _full(rank + 7, dtype)
    dist.all_reduce(total)
    dist.broadcast(sent, 1)
    gathered = torch.empty(10, device="npu", dtype=dtype)
    dist.all_gather_into_tensor(gathered, _full(rank, dtype))

    assert total.dtype == dtype
    assert total.tolist() == [3] * 5
    assert sent.tolist() == [8] * 5
    assert gathered.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("size", [1, 3, 17, 1031])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.bool])
def test_all_gather_into_a_list_loses_nothing(rank: int, dtype: torch.dtype, size: int) -> None:
    whole = torch.arange(2 * size) % (2 if dtype == torch.bool else 113)
    gathered = [torch.zeros(size, device="npu", dtype=dtype) for _ in range(2)]
    dist.all_gather(gathered, whole[rank * size :][:size].to("npu", dtype))

    assert torch.equal(torch.cat(gathered).cpu(), whole.to(dtype))


def test_tensors_that_are_not_contiguous_are_refused_by_the_backend(rank: int) -> None:
    with pytest.raises(RuntimeError, match="must be contiguous"):
        dist.all_reduce(torch.ones(3, 5, device="npu").t())


@pytest.mark.parametrize("dtype", DTYPES[:-1])  # torch_npu refuses the last, uint8
def test_reduce_scatter(rank: int, dtype: torch.dtype) -> None:
    part = torch.empty(3, device="npu", dtype=dtype)
    dist.reduce_scatter_tensor(part, torch.arange(6, device="npu").to(dtype))

    assert part.tolist() == [2 * (3 * rank + i) for i in range(3)]


@pytest.mark.parametrize(
    ("op", "expected"),
    [(dist.ReduceOp.MAX, 3), (dist.ReduceOp.MIN, 2), (dist.ReduceOp.PRODUCT, 6), (dist.ReduceOp.AVG, 2.5)],
    ids=["max", "min", "product", "avg"],
)
def test_reductions(rank: int, op: dist.ReduceOp.RedOpType, expected: float) -> None:
    values = _full(rank + 2)
    dist.all_reduce(values, op)

    assert values.tolist() == [expected] * 5


def test_half_precision_is_added_up_in_float(rank: int) -> None:
    values = torch.tensor([1.0 if rank == 0 else 2.0**-8], dtype=torch.bfloat16, device="npu")
    dist.all_reduce(values)

    assert values.item() == torch.tensor(1.0 + 2.0**-8).bfloat16().item()


def test_scatter_and_reduce(rank: int) -> None:
    part = torch.empty(2, device="npu")
    dist.scatter(part, [_full(0.0, size=2), _full(1.0, size=2)] if rank == 0 else None, 0)
    total = _full(rank + 1)
    dist.reduce(total, 0)

    assert part.tolist() == [rank] * 2
    assert rank == 1 or total.tolist() == [3] * 5


def test_all_to_all_with_uneven_parts(rank: int) -> None:
    out = torch.empty(2 + 2 * rank, device="npu")
    sent = torch.arange(3.0, device="npu") + 100 * rank
    dist.all_to_all_single(out, sent, [1 + rank] * 2, [1, 2])

    assert out.tolist() == ([0, 100] if rank == 0 else [1, 2, 101, 102])


def test_send_and_receive(rank: int) -> None:
    mine, other = _full(rank), torch.empty(5, device="npu")
    operations = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()

    assert other.tolist() == [1 - rank] * 5


def test_objects_and_barrier(rank: int) -> None:
    gathered: list[object] = [None, None]
    dist.barrier()
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * 100 * rank})

    assert gathered == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 100}]


@pytest.mark.parametrize("length", [0, 1, 7, 513, 20_001])
def test_objects_of_uneven_sizes(rank: int, length: int) -> None:
    """Their pickles are padded to a common length with operators of the runtime itself."""
    mine = {"rank": rank, "data": bytes(range(256)) * (rank + 1), "text": "é" * length * rank}
    theirs = {"rank": 1 - rank, "data": bytes(range(256)) * (2 - rank), "text": "é" * length * (1 - rank)}
    pair = [mine, theirs] if rank == 0 else [theirs, mine]
    everyone: list[object] = [None, None]
    dist.all_gather_object(everyone, mine)
    sent = [mine, length] if rank == 1 else [None, None]
    dist.broadcast_object_list(sent, 1)
    collected: list[object] | None = [None, None] if rank == 0 else None
    dist.gather_object(mine, collected, 0)
    part: list[object] = [None]
    dist.scatter_object_list(part, pair if rank == 0 else None, 0)

    assert everyone == pair
    assert sent == [pair[1], length]
    assert collected == (pair if rank == 0 else None)
    assert part == [mine]


def test_subgroups(rank: int) -> None:
    groups = [dist.new_group([0]), dist.new_group([1])]
    values = _full(rank + 1)
    dist.all_reduce(values, group=groups[rank])
    dist.all_reduce(values, group=dist.new_group([0, 1]))

    assert values.tolist() == [3] * 5


def test_double_is_refused_by_the_backend(rank: int) -> None:
    with pytest.raises(RuntimeError, match=r"Float64|[dD]ouble"):
        dist.all_reduce(_full(rank, torch.float64))


def _ddp_losses(name: str, device: torch.device, group: dist.ProcessGroup | None) -> tuple[list[float], Tensor]:
    rank = dist.get_rank()
    make, data = NETWORKS[name]
    torch.manual_seed(rank)  # DDP hands rank 0's weights to the others
    devices = None if device.type == "cpu" else [rank]
    model = DistributedDataParallel(make().to(device), device_ids=devices, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(10 + rank)
    losses = []
    for _ in range(5):
        inputs, labels = data(), torch.randint(0, 4, (8,))
        loss = F.cross_entropy(model(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer"])
def test_ddp_is_that_of_gloo_on_the_cpu(rank: int, name: str) -> None:
    gloo = dist.new_group(backend="gloo")
    expected, expected_weights = _ddp_losses(name, torch.device("cpu"), gloo)
    losses, weights = _ddp_losses(name, torch.device("npu", rank), None)
    theirs = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(theirs, weights, group=gloo)

    assert losses == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(weights, expected_weights, atol=1e-5)
    assert torch.equal(theirs[0], theirs[1])


def test_sync_batch_norm_sees_the_whole_batch(rank: int) -> None:
    torch.manual_seed(0)
    whole, inputs = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    expected = whole(inputs)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3)).to("npu")
    result = layer(inputs[4 * rank : 4 * rank + 4].to("npu"))

    assert torch.allclose(result.cpu(), expected[4 * rank : 4 * rank + 4], atol=1e-5)
    assert torch.allclose(layer.running_var.cpu(), whole.running_var, atol=1e-5)


def test_ranks_that_disagree_are_told_so(rank: int) -> None:
    with pytest.raises(RuntimeError, match=r"collective mismatch|HCCL|hccl"):
        dist.all_reduce(_full(1.0, size=3 + rank))
