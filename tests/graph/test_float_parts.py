"""What of a forward is told to stay in float beside the layers: operators by their function, modules by their class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import QuantPlan
from tests.graph.models import Model, image


def rows() -> Tensor:
    return torch.randn(2, 3, 4)


def parts_of(model: nn.Module, input_data: Any, run: nn.Module | None = None) -> dict[str, int]:
    return dict(make_plan(model, None, input_data, run).float_parts)


def attention(m: Model, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.a(x), m.b(x), x)


def attention_by_hand(m: Model, x: Tensor) -> Tensor:
    return torch.softmax(m.a(x) @ m.b(x).mT, -1) @ x


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (lambda m, x: m.b(m.a(x)), {}),
        (lambda m, x: m.b(F.gelu(m.a(x)) + x).mean(1), {}),
        (attention, {"scaled_dot_product_attention": 1}),
        (lambda m, x: attention(m, x[:, None]), {"scaled_dot_product_attention": 1}),  # one kernel, and not three
        (lambda m, x: attention(m, x @ x.mT @ x) @ x.mT, {"scaled_dot_product_attention": 1, "matmul": 3}),
        (attention_by_hand, {"matmul": 2, "softmax": 1}),
        (lambda m, x: torch.einsum("bij,bkj->bik", m.a(x), m.b(x)), {"matmul": 1}),
        (lambda m, x: F.layer_norm(m.b(m.a(x)), (4,)), {"layer_norm": 1}),
        (lambda m, x: F.linear(m.a(x), torch.ones(4, 4)), {"matmul": 1}),
        (lambda m, x: F.conv1d(m.a(x), torch.ones(3, 3, 1)), {"convolution": 1}),
        (lambda m, x: m.a(x).log_softmax(-1), {"softmax": 1}),
    ],
)
def test_operators_are_told_by_the_function_that_people_know(
    forward: Callable[[Model, Tensor], Tensor], parts: dict[str, int]
) -> None:
    assert parts_of(Model(forward), rows()) == parts


@pytest.mark.parametrize(
    "part", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(1, 3), nn.RNN(4, 4), nn.PReLU(), nn.Bilinear(4, 4, 4)]
)
def test_a_module_with_parameters_is_told_by_its_class_and_not_by_its_operators(part: nn.Module) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        y = m.a(x)
        y = m.part(y, y) if isinstance(part, nn.Bilinear) else m.part(y)
        return m.b(y[0] if isinstance(y, tuple) else y)

    model = Model(forward)
    model.part = part
    model.idle = nn.LayerNorm(4)  # not called, so not told
    assert parts_of(model, rows()) == {type(part).__name__: 1}


def test_layers_that_have_a_row_are_not_told_again() -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), MyLinear(4, 4, bias=False), MyLinear(4, 4))
    assert parts_of(model, rows()) == {}


def test_an_embedding_that_shares_its_weight_with_the_head_is_told() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    assert parts_of(Tied(), torch.tensor([[1, 2]])) == {"Embedding": 1}


def test_a_batch_norm_is_told_unless_the_record_folds_it() -> None:
    def folded(m: Model, x: Tensor) -> Tensor:
        return m.bn(m.conv(x))

    def alone(m: Model, x: Tensor) -> Tensor:
        return m.conv(m.bn(x))

    assert parts_of(Model(folded), image()) == {}
    assert parts_of(Model(alone), image()) == {"BatchNorm2d": 1}


def test_a_transformer_tells_most_first() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = make_plan(nn.TransformerEncoder(layer, 3), None, torch.randn(2, 3, 8))
    assert plan.float_parts == (("LayerNorm", 6), ("matmul", 3), ("scaled_dot_product_attention", 3))


class Wrapper(nn.Module):
    """Calls a part, and computes something of its own."""

    def __init__(self, part: nn.Module, method: str = "__call__") -> None:
        super().__init__()
        self.part, self.method = part, method

    def forward(self, x: Tensor) -> Tensor:
        own = (x @ x.mT).softmax(-1)
        return own @ getattr(self.part, self.method)(x)


def test_operators_around_the_part_that_is_converted_are_not_its_own() -> None:
    part = Model(attention)
    assert parts_of(part, rows(), Wrapper(part)) == {"scaled_dot_product_attention": 1}


def test_a_part_that_is_used_without_its_forward_still_tells_its_operators() -> None:
    part = Model(attention)
    assert parts_of(part, rows(), Wrapper(part, "forward"))["scaled_dot_product_attention"] == 1


def test_checkpoints_keep_it_and_older_ones_are_read_without() -> None:
    plan = make_plan(Model(attention), None, rows())
    plain = plan.to_dict()
    assert QuantPlan.from_dict(plain).float_parts == plan.float_parts
    del plain["float_parts"]
    assert QuantPlan.from_dict(plain).float_parts == ()
