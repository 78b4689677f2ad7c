"""The packed weight: made when the weight's codes change, and only then; no part of a copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from amct_lightning.modules.integer import PackedWeight
from tests.modules.integer.cases import Case


class Packings(TorchDispatchMode):
    """Counts how often a weight is packed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.onednn.qconv_prepack.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def case() -> Case:
    case = Case.make(nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5))
    case.integers()  # the first use tries the CPU
    return case


def packings(case: Case, packed: PackedWeight) -> int:
    with Packings() as packings:
        case.integers(packed)
    return packings.count


def test_weight_is_packed_once_while_it_stays(case: Case) -> None:
    packed = PackedWeight()
    assert [packings(case, packed) for _ in range(3)] == [1, 0, 0]
    case.x = torch.randn(1, 4, 5, 5)
    assert packings(case, packed) == 0  # another batch


def test_result_with_a_kept_weight_is_the_same(case: Case) -> None:
    packed = PackedWeight()
    assert torch.equal(case.integers(packed), case.integers(packed))


def _step(weight: nn.Parameter, case: Case) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.randn_like(weight)
    optimizer.step()


def _data(weight: nn.Parameter, case: Case) -> None:
    weight.data.mul_(torch.rand_like(weight))


def _unversioned(weight: nn.Parameter, case: Case) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.neg_()


def _scale(weight: nn.Parameter, case: Case) -> None:
    case.numbers.weight_scale.mul_(2)


def _replaced(weight: nn.Parameter, case: Case) -> None:
    case.layer.weight = nn.Parameter(weight.detach().flip(0))


@pytest.mark.parametrize("change", [_step, _data, _unversioned, _scale, _replaced])
def test_whatever_changes_the_weight_is_noticed(case: Case, change: Callable[[Tensor, Case], None]) -> None:
    packed = PackedWeight()
    case.integers(packed)
    change(case.layer.weight, case)
    assert torch.equal(case.integers(packed), case.integers(PackedWeight()))


def test_copies_and_pickles_begin_empty(case: Case) -> None:
    case.layer.packed = PackedWeight()
    case.integers(case.layer.packed)
    for copied in (copy.deepcopy(case.layer), pickle.loads(pickle.dumps(case.layer)), copy.copy(case.layer.packed)):
        packed = copied if isinstance(copied, PackedWeight) else copied.packed
        assert packed is not case.layer.packed
        assert packings(case, packed) == 1
    assert set(case.layer.state_dict()) == {"weight", "bias"}


def test_cleared_one_keeps_nothing(case: Case) -> None:
    packed = PackedWeight()
    case.integers(packed)
    packed.clear()
    assert packings(case, packed) == 1
