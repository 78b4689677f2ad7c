"""Which BatchNorm is folded: one that does nothing but normalize."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from amct_lightning import QuantRecord, calibrate, prepare_qat
from tests.graph.models import image, layers


class Before(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * x)


class Behind(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Mixin:
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class Mixed(Mixin, nn.BatchNorm2d):
    pass


class Named(nn.BatchNorm2d):
    """A subclass with another way to be made, as in many libraries."""

    def __init__(self, features: int) -> None:
        super().__init__(features, eps=1e-3)
        self.tag = "mine"


class Synchronized(nn.SyncBatchNorm):
    pass


def network(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.Flatten(), nn.Linear(72, 2))


def replaced() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, 3 * x)  # type: ignore[method-assign]
    return norm


def parametrized() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


MORE: dict[str, Any] = {
    "before": lambda: Before(2),
    "behind": lambda: Behind(2),
    "mixin": lambda: Mixed(2),
    "replaced": replaced,
}
PLAIN: dict[str, Any] = {
    "subclass": lambda: Named(2),
    "synchronized": lambda: Synchronized(2),
    "parametrized": parametrized,
}


@pytest.mark.parametrize("kind", MORE)
def test_one_that_does_more_is_not_folded(kind: str) -> None:
    model, x = network(MORE[kind]()), image()
    assert layers(model, x)["0"].batch_norm is None
    converted = prepare_qat(model, None, x)
    calibrate(converted, [x])
    scales = converted[0].weight_quantizer.max_abs_scale(converted[0].weight)
    assert QuantRecord.from_model(converted)["0"].scale_w == scales.tolist()


@pytest.mark.parametrize("kind", PLAIN)
def test_a_subclass_with_the_forward_of_a_batch_norm_is_folded(kind: str) -> None:
    assert layers(network(PLAIN[kind]()), image())["0"].batch_norm == "1"


@pytest.mark.parametrize("kind", MORE)
def test_the_search_for_shifts_looks_at_the_sums_of_the_layer(kind: str) -> None:
    model, x = network(MORE[kind]()), image()
    converted = prepare_qat(model, None, x, search_n=True)
    calibrate(converted, [x])
    alone = nn.Sequential(converted[0]).eval()
    converted.eval()(x)
    found = QuantRecord.from_model(converted)["0"].shift_bit
    converted[0].shift_search.reset_parameters()
    alone(x)
    assert found == QuantRecord.from_model(converted)["0"].shift_bit


@pytest.mark.parametrize("name", ["0", "1"])
def test_the_search_for_shifts_does_not_look_behind_a_hook(name: str) -> None:
    """A hook of the user may return something else than the sums; that of the search runs before it."""
    x = image()
    plain, hooked = network(nn.BatchNorm2d(2)), network(nn.BatchNorm2d(2))
    if name == "0":  # without the BatchNorm the sums are those of the convolution
        plain[1], hooked[1] = nn.Identity(), nn.Identity()
    hooked.get_submodule(name).register_forward_hook(lambda _m, _a, y: 1000 * y)
    shifts = []
    for model in (plain, hooked):
        converted = prepare_qat(model, None, x, search_n=True)
        calibrate(converted, [x])
        converted.eval()(x)
        shifts.append(QuantRecord.from_model(converted)["0"].shift_bit)
    assert shifts[0] == shifts[1]
