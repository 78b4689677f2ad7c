"""The table in which the factors of all quantizers are computed together gives what each would compute for itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat
from amct_lightning.modules import activation_quantizers
from tests.operators import Operators


class Branches(nn.Module):
    """Layers of two widths, called in an order that can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.order = [0, 1, 2]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x).relu()
        return x


WIDTHS = {"layers.1": {"activations": {"dst_type": "INT16"}}}


@pytest.fixture
def pair() -> tuple[Branches, Branches]:
    """A model, and one whose quantizers do without the table."""
    x = torch.randn(8, 4)
    model = prepare_qat(Branches(), {"layers": WIDTHS}, x, execution="composite")
    calibrate(model, [x])
    alone = copy.deepcopy(model)
    for quantizer in activation_quantizers(alone).values():
        quantizer.table = None
    return model.train(), alone.train()


def step(model: Branches, x: Tensor, rate: float = 0.3) -> None:
    model.zero_grad()
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(rate * parameter.grad.sign())  # which no version counter sees


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


ORDERS = {
    "in_order": [[0, 1, 2]] * 4,
    "another_order": [[0, 1, 2], [2, 0, 1], [1, 2, 0]],
    "skipped": [[0], [1, 2], [0, 1, 2], [2]],
    "twice": [[0, 0, 1], [1, 1, 1], [2, 0, 2]],
}


@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_training_is_equal_to_the_bit(pair: tuple[Branches, Branches], orders: list[list[int]]) -> None:
    torch.manual_seed(1)
    for order in orders * 5:
        x = torch.randn(8, 4)
        for model in pair:
            model.order = order
            step(model, x)
        assert same(*pair)
    assert any(q.clip_max_previous < 1 for q in activation_quantizers(pair[0]).values())  # the clips have moved


def halve(model: Branches) -> None:
    for quantizer in activation_quantizers(model).values():
        quantizer.clip_max.data.mul_(0.5)


def replace(model: Branches) -> None:
    for quantizer in activation_quantizers(model).values():
        quantizer.clip_max = nn.Parameter(quantizer.clip_max.detach() * 0.5)


def load(model: Branches) -> None:
    model.load_state_dict({k: v * 0.5 if k.endswith("clip_max") else v for k, v in model.state_dict().items()})


@pytest.mark.parametrize("write", [halve, replace, load])
def test_clips_that_were_written_count(pair: tuple[Branches, Branches], write: Callable[[Branches], None]) -> None:
    x = torch.randn(8, 4)
    for model in pair:
        model(x)
        write(model)
    assert torch.equal(pair[0](x), pair[1](x))


def test_evaluation_in_between_changes_nothing(pair: tuple[Branches, Branches]) -> None:
    x = torch.randn(8, 4)
    for _ in range(3):
        for model in pair:
            step(model, x)
        with torch.no_grad():
            assert torch.equal(pair[0].eval()(x), pair[1].eval()(x))
            pair[0].train(), pair[1].train()
            assert torch.equal(pair[0](x), pair[1](x))
    assert same(*pair)


def test_a_frozen_quantizer_keeps_its_range(pair: tuple[Branches, Branches]) -> None:
    x = torch.randn(8, 4)
    for model in pair:
        model(x)
        model.layers[0].input_quantizer.freeze()
        step(model, x)
        step(model, x)
    assert same(*pair)


def test_a_nan_clip_is_told(pair: tuple[Branches, Branches]) -> None:
    model = pair[0]
    model.layers[2].input_quantizer.clip_max.data.fill_(float("nan"))
    model.order = [0, 2]
    model(torch.randn(8, 4))
    assert [bool(q.nonfinite) for q in activation_quantizers(model).values()] == [False, False, True]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_table_of_their_own(
    pair: tuple[Branches, Branches], duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    copied = duplicate(pair[0])
    tables = {id(q.table) for q in activation_quantizers(copied).values()}
    assert len(tables) == 1
    assert id(pair[0].layers[0].input_quantizer.table) not in tables
    x = torch.randn(8, 4)
    step(copied, x)
    step(pair[0], x)
    assert same(copied, pair[0])


def test_a_copied_layer_does_not_take_the_model_along(pair: tuple[Branches, Branches]) -> None:
    layer = copy.deepcopy(pair[0].layers[0])
    assert len(pickle.dumps(layer)) < 2 * len(pickle.dumps(pair[0].layers[0]))
    assert torch.equal(layer(torch.ones(1, 4)), pair[0].layers[0](torch.ones(1, 4)))


def test_the_operators_of_a_step_do_not_grow_with_single_numbers() -> None:
    def operators(layers: int) -> int:
        x = torch.randn(2, 4)
        net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(layers)))
        counts = []
        for model in (net, prepare_qat(net, None, x, execution="composite")):
            if model is not net:
                calibrate(model, [x])
            model.train()
            for _ in range(2):
                model(x).sum().backward()
                model.zero_grad()
            with Operators() as counted:
                model(x).sum().backward()
            assert not counted.host_reads
            counts.append(sum(counted.counts.values()))
        return counts[1] - counts[0]

    assert operators(24) - operators(4) <= 20 * 66


class Attention(nn.Module):
    """Three layers that read one tensor, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.out(self.out(self.q(x) * self.k(x) + self.v(x)))


def test_layers_that_share_a_quantizer_share_its_row() -> None:
    x = torch.randn(8, 4)
    model = prepare_qat(Attention(), None, x, execution="composite", allow_reuse=True)
    calibrate(model, [x])
    alone = copy.deepcopy(model.train())
    for quantizer in activation_quantizers(alone).values():
        quantizer.table = None
    for _ in range(5):
        for each in (model, alone):
            each.zero_grad()
            each(x).square().sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.data.sub_(0.3 * parameter.grad.sign())
        assert same(model, alone)
    with Operators() as operators:
        model(x)
    assert operators.counts["aten::stack"] == 2  # the clips of all, and the columns: one table for the forward
