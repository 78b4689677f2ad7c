"""What is done once for a model takes time in proportion to its layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from amct_lightning import prepare_qat
from amct_lightning.conversion.copies import float_copies


def calls(action: Callable[[], object]) -> int:
    """Count the calls of Python functions."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def linear(depth: int) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(4, 4), nn.ReLU())]), torch.randn(2, 4)


def convolutional(depth: int) -> tuple[nn.Module, torch.Tensor]:
    layers = [m for _ in range(depth) for m in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(2, 2, 2, 2)


def conversion(model: nn.Module, x: torch.Tensor) -> int:
    return calls(lambda: prepare_qat(model, None, x))


def search_for_copies(model: nn.Module, x: torch.Tensor) -> int:
    whole = nn.ModuleDict(
        {"teacher": nn.Sequential(*[nn.Linear(4, 4) for _ in model]), "net": prepare_qat(model, None, x)}
    )
    return calls(lambda: list(float_copies(whole)))


@pytest.mark.parametrize("network", [linear, convolutional])
@pytest.mark.parametrize("work", [conversion, search_for_copies])
def test_four_times_the_layers_are_about_four_times_the_work(
    work: Callable[[nn.Module, torch.Tensor], int], network: Callable[[int], tuple[nn.Module, torch.Tensor]]
) -> None:
    conversion(*network(2))  # what is imported and kept the first time
    assert work(*network(80)) < 5 * work(*network(20))


def test_a_copy_among_many_layers_of_one_shape_is_found() -> None:
    model, x = linear(10)
    teacher = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    teacher[3].load_state_dict(model[8].state_dict())
    whole = nn.ModuleDict({"teacher": teacher, "net": prepare_qat(model, None, x)})
    assert [(name, other) for name, _, other, _ in float_copies(whole)] == [("teacher.3", "net.8")]
