"""The losses themselves, and which tensor of an output they compare."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from amct_lightning.callbacks.distill.losses import divergence, first_tensor, squared_error, tensor_in


def by_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each position, the classes last, and their mean."""
    learned, taught = (functional.log_softmax(t.double() / temperature, -1).flatten(0, -2) for t in (student, teacher))
    rows = [functional.kl_div(a, b, log_target=True, reduction="sum") for a, b in zip(learned, taught, strict=True)]
    return torch.stack(rows).mean() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("shape", "classes"), [((5, 7), 1), ((2, 3, 7), 2), ((2, 7, 3, 3), 1), ((2, 7, 3, 3, 2), 1), ((7,), 0)]
)
def test_the_divergence_is_a_mean_over_all_positions(shape: tuple[int, ...], classes: int, temperature: float) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    rows = [tensor.movedim(classes, -1).reshape(-1, 7) for tensor in (student, teacher)]
    expected = by_rows(rows[0], rows[1], temperature)
    torch.testing.assert_close(divergence(student, teacher, temperature).double(), expected, rtol=1e-5, atol=1e-6)


def test_masked_classes_are_not_nan_and_have_no_gradient() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    expected = divergence(student[:, :3], teacher[:, :3], 2.0)
    student[:, 3] = teacher[:, 3] = -torch.inf
    student.requires_grad_()
    loss = divergence(student, teacher, 2.0)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient[:, 3], torch.zeros(3))
    assert gradient[:, :3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_they_compute_in_float32_or_more(dtype: torch.dtype) -> None:
    student, teacher = (100 * torch.randn(4, 6)).to(dtype), (100 * torch.randn(4, 6)).to(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    for loss in (divergence(student, teacher, 2.0), squared_error(student, teacher)):
        assert loss.dtype == expected
        assert loss.isfinite()
    torch.testing.assert_close(
        squared_error(student, teacher), (student.to(expected) - teacher.to(expected)).pow(2).mean()
    )


SCORES = torch.ones(2)


@pytest.mark.parametrize(
    ("output", "key"),
    [
        (SCORES, None),
        ({"logits": SCORES, "loss": torch.zeros(1)}, None),
        (OrderedDict(hidden=SCORES, ids=torch.zeros(1, dtype=torch.long)), None),
        (SimpleNamespace(logits=SCORES), None),
        ((SCORES, None), None),
        ({"a": SCORES, "b": torch.zeros(1)}, "a"),
        (SimpleNamespace(scores=SCORES), "scores"),
    ],
)
def test_the_compared_tensor_is_found(output: Any, key: str | None) -> None:
    assert tensor_in(output, key, "net") is SCORES


def test_of_a_layer_the_first_tensor_counts() -> None:
    assert first_tensor((SCORES, (torch.zeros(1), torch.zeros(1)))) is SCORES  # as of an LSTM
    assert first_tensor((None, 3)) is None
