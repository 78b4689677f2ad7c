"""Which inputs are known to be never negative: the rule ``fixed_min: propagate``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.config import QuantChoices
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import LayerPlan
from amct_lightning.graph.forward import Forward
from amct_lightning.graph.nonnegative import _CONDITIONS

Between = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Any code between two layers; what it returns becomes rows of the second one."""

    def __init__(self, between: Between, features: int = 4) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(2, 4, 1), between, nn.Linear(features, 2)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        made = self.between(self.a(x)).float()
        self.seen.append(made.min().item())
        flat = made.reshape(-1)
        return self.b(flat[: flat.numel() // 4 * 4].view(-1, 4))


def image() -> Tensor:
    return 3 * torch.randn(2, 2, 6, 6)


def planned(model: nn.Module, training: bool = False) -> LayerPlan:
    forward = Forward(model.train(training), image(), sees_training=training)
    return make_plan(model, QuantChoices(), forward).layers[-1]


def relu_then(function: Between) -> Between:
    return lambda x: function(F.relu(x))


NEVER_NEGATIVE: dict[str, Between] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": nn.Hardtanh(0.5, 1.0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_of_both": lambda x: torch.clamp(x, 0, 6),
    "clamp_in_place": lambda x: x.clamp_(0),
    "clamp_by_a_relu": lambda x: x.clamp(min=F.relu(x - 1)),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(1),
    "abs": torch.abs,
    "square": torch.square,
    "power": lambda x: x**2,
    "power_as_a_float": lambda x: x**4.0,
    "times_itself": lambda x: x * x,
    "exp": torch.exp,
    "softplus": F.softplus,
    "norm": lambda x: x.norm(dim=1),
    "maximum": lambda x: torch.maximum(x, F.relu(x - 1)),
    "sum": lambda x: F.relu(x) + torch.sigmoid(x),
    "sum_with_a_number": lambda x: F.relu(x) + 0.5,
    "product": lambda x: F.relu(x) * torch.sigmoid(x),
    "quotient": lambda x: F.relu(x) / 2,
    "concatenation": lambda x: torch.cat([F.relu(x), x.abs()], 1),
    "concatenation_with_zeros": lambda x: torch.cat([F.relu(x), torch.zeros(2, 4, 6, 6)], 1),
    "stack": lambda x: torch.stack([F.relu(x), x.abs()]),
    "choice": lambda x: torch.where(x > 1, F.relu(x), 0.0),
    "comparison": lambda x: (x > 0).float(),
    "max_pool": relu_then(lambda x: F.max_pool2d(x, 2, padding=1)),
    "max_pool1d": relu_then(lambda x: F.max_pool1d(x[0], 2)),
    "avg_pool": relu_then(lambda x: F.avg_pool2d(x, 2, padding=1)),
    "global_pool": relu_then(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive_pool": relu_then(lambda x: F.adaptive_avg_pool2d(x, 2)),
    "adaptive_max_pool": relu_then(lambda x: F.adaptive_max_pool2d(x, 2)),
    "mean": relu_then(lambda x: x.mean((2, 3))),
    "flatten": relu_then(nn.Flatten()),
    "flatten_of_a_matrix": relu_then(lambda x: x.reshape(-1, 4).flatten(1)),
    "view": relu_then(lambda x: x.view(2, -1)),
    "reshape": relu_then(lambda x: x.transpose(1, 2).reshape(2, -1)),
    "transpose": relu_then(lambda x: x.transpose(1, 2)),
    "permute": relu_then(lambda x: x.permute(0, 2, 3, 1)),
    "squeeze": relu_then(lambda x: x.unsqueeze(0).squeeze(0)),
    "expand": relu_then(lambda x: x[:, :1].expand(2, 4, 6, 6)),
    "repeat": relu_then(lambda x: x.repeat(1, 2, 1, 1)),
    "chunk": relu_then(lambda x: x.chunk(2, 1)[1]),
    "split": relu_then(lambda x: torch.split(x, [1, 3], 1)[1]),
    "unbind": relu_then(lambda x: x.unbind(1)[2]),
    "indexing": relu_then(lambda x: x[:, [2, 0]]),
    "index_select": relu_then(lambda x: x.index_select(1, torch.tensor([1]))),
    "topk": relu_then(lambda x: x.topk(2, 1).values),
    "pixel_shuffle": relu_then(lambda x: F.pixel_shuffle(x, 2)),
    "channel_shuffle": relu_then(lambda x: F.channel_shuffle(x, 2)),
    "unfold": relu_then(lambda x: F.unfold(x, 2)),
    "identity": relu_then(nn.Identity()),
    "dropout": relu_then(nn.Dropout()),
    "dropout2d": relu_then(nn.Dropout2d()),
    "upsampling": relu_then(lambda x: F.interpolate(x, scale_factor=2)),
    "bilinear": relu_then(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "padding": relu_then(lambda x: F.pad(x, (1, 1))),
    "reflection": relu_then(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "leaky_relu": relu_then(F.leaky_relu),
    "silu": relu_then(F.silu),
    "tanh": relu_then(torch.tanh),
    "glu": relu_then(lambda x: F.glu(x, 1)),
    "to_half_and_back": relu_then(lambda x: x.half().float()),
    "matrix_product": lambda x: x.softmax(-1) @ F.relu(x),
    "in_place": lambda x: F.relu(x).mul_(2).add_(1),
    "max_of_a_dimension": relu_then(lambda x: x.max(1).values),
}

MAY_BE_NEGATIVE: dict[str, Between] = {
    "nothing": lambda x: x,
    "hardtanh": F.hardtanh,
    "clamp_from_below_0": lambda x: x.clamp(min=-1),
    "clamp_from_above": lambda x: x.clamp(max=3),
    "clamp_to_a_negative_number": lambda x: x.clamp(min=0, max=-1),
    "clamp_of_a_relu_from_above": relu_then(lambda x: x.clamp(max=-0.5)),
    "threshold_with_a_negative_value": lambda x: F.threshold(x, 0.0, -1.0),
    "threshold_below_0": lambda x: F.threshold(x, -1.0, 0.0),
    "softplus_with_beta_below_0": lambda x: F.softplus(x, beta=-1),
    "odd_power": lambda x: x**3,
    "product_of_two": lambda x: x * (x + 0.1),
    "product_with_a_negative_number": relu_then(lambda x: x * -1),
    "sum_with_a_negative_number": relu_then(lambda x: x - 0.5),
    "sum_with_alpha": relu_then(lambda x: torch.add(x, x, alpha=-2)),
    "residual": lambda x: F.relu(x) + x,
    "difference": lambda x: 1 - torch.sigmoid(x) * 2,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "logsigmoid": F.logsigmoid,
    "log_softmax": lambda x: x.log_softmax(1),
    "log": relu_then(torch.log),
    "bicubic": relu_then(lambda x: F.interpolate(x, scale_factor=3, mode="bicubic")),
    "padding_with_a_negative_number": relu_then(lambda x: F.pad(x, (1, 1), value=-1.0)),
    "concatenation_with_another": lambda x: torch.cat([F.relu(x), x], 1),
    "choice_of_another": lambda x: torch.where(x > 1, F.relu(x), x),
    "masked": relu_then(lambda x: x.masked_fill(x > 1, -1.0)),
    "alpha_dropout": relu_then(lambda x: F.alpha_dropout(x, 0.5, True)),
    "bits_of_another_type": lambda x: F.relu(x).view(torch.int32).neg().view(torch.float32),
    "through_small_integers": relu_then(lambda x: (x * 200).to(torch.int8).float()),
    "layer_norm": relu_then(lambda x: F.layer_norm(x, (6,))),
    "cosine": relu_then(lambda x: torch.cos(3 * x)),
    "negative_constant": lambda x: torch.full_like(x, -1.0),
    "standardized": lambda x: torch.var_mean(x, 1)[1],
}


@pytest.mark.parametrize("name", NEVER_NEGATIVE)
def test_what_is_never_negative_is_known_to_be(name: str) -> None:
    model = Net(NEVER_NEGATIVE[name])
    found = planned(model)
    assert (found.fixed_min, found.never_negative) == (True, True)
    for _ in range(20):
        model(image())
    assert min(model.seen) >= 0


@pytest.mark.parametrize("name", MAY_BE_NEGATIVE)
def test_nothing_is_promised_of_what_may_be_negative(name: str) -> None:
    found = planned(Net(MAY_BE_NEGATIVE[name]))
    assert (found.fixed_min, found.never_negative) == (False, False)


def test_a_write_through_a_view_is_seen() -> None:
    def between(x: Tensor) -> Tensor:
        y = F.relu(x)
        y[:, :1].sub_(5)
        return y

    assert not planned(Net(between)).fixed_min


def test_bytes_are_never_negative() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.float() / 255)

    for dtype, known in ((torch.uint8, True), (torch.int8, False)):
        plan = make_plan(Bytes(), QuantChoices(), torch.ones(1, 2, 4, 4, dtype=dtype))
        assert plan.layers[0].fixed_min is known


@pytest.mark.parametrize("function", [nn.Dropout(), nn.Dropout2d(), lambda x: F.dropout(x, 0.3)])
def test_it_holds_in_training_with_dropout(function: Between) -> None:
    assert planned(Net(relu_then(function)), training=True).fixed_min


def test_it_must_hold_in_training_as_well() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.a(x)).permute(0, 2, 3, 1)
            return self.b(x - 1 if self.training else x)

    assert planned(Noisy(F.relu)).fixed_min
    assert not planned(Noisy(F.relu), training=True).fixed_min


class Two(nn.Module):
    """Two layers that read one value in evaluation, and in training the second one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.abs()
        return self.a(x) + self.b(x - 1 if self.training else x)


def test_layers_share_a_range_from_0_on_only_if_it_holds_for_all_of_them() -> None:
    model = Two().train()
    plan = make_plan(model, QuantChoices(), Forward(model, image(), sees_training=True))
    assert [(layer.shares_input_of, layer.fixed_min) for layer in plan.layers] == [("a", False), ("a", False)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_input_of_a_recurrent_layer_and_not_its_hidden_state(kind: Any, batch_first: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(6, 4, batch_first=batch_first)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(torch.sigmoid(x))

    layer = make_plan(Recurrent(), QuantChoices(), torch.randn(2, 3, 6)).layers[0]
    assert (layer.fixed_min, layer.fixed_min_hidden) == (True, False)


@pytest.mark.parametrize("operator", _CONDITIONS)
def test_the_table_names_operators_and_their_arguments(operator: str) -> None:
    name, _, overload = operator.partition(".")
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload)] if overload else [getattr(packet, each) for each in packet.overloads()]
    known = [{argument.name for argument in found._schema.arguments} for found in overloads]
    words = re.findall(r"[a-z]\w*", _CONDITIONS[operator].replace("even:", ""))
    assert any(set(words) <= arguments for arguments in known)
