"""What is a node of the graph that AMCT has exported, where the observed operators do not show it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.models import Model, layers

Operation = Callable[[Tensor], Tensor]


def named(**operations: Operation) -> Any:
    return pytest.mark.parametrize("operation", list(operations.values()), ids=list(operations))


def shared(first: Operation, second: Operation, *shape: int) -> bool:
    """Whether two layers share a quantizer that read what two operations make of one value."""
    model = Model(lambda m, x: m.a(first(x)) + m.b(second(x)))
    return layers(model, torch.randn(*shape or (3, 4)))["b"].shares_input_of == "a"


class TestEqualOperatorsOnOneValue:
    @named(
        relu=F.relu,
        relu6=F.relu6,
        leaky_relu=F.leaky_relu,
        sigmoid=torch.sigmoid,
        constant=lambda x: x * 2,
        square=lambda x: x * x,
        max_pool=lambda x: F.max_pool1d(x, 3, 1, 1),
        reshape=lambda x: x.reshape(2, 6).reshape(3, 4),
        to_float=lambda x: x.float(),
        from_double=lambda x: x.double().float(),
        norm=lambda x: F.layer_norm(x, [4]),
        slice=lambda x: x[:2],
        part=lambda x: x.chunk(3)[1],
        transposed=lambda x: x.reshape(4, 3).t(),
        chain=lambda x: F.relu(torch.sigmoid(x) - 0.5),
    )
    def test_they_are_one_node(self, operation: Operation) -> None:
        assert shared(operation, operation)

    def test_its_readers_know_that_a_relu_made_it(self) -> None:
        found = layers(Model(lambda m, x: m.a(F.relu(x)) + m.b(F.relu(x))), torch.randn(3, 4))
        assert [layer.fixed_min for layer in found.values()] == [True, True]

    def test_also_in_two_modules_of_the_user(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(F.relu(x))

        model = Model(lambda m, x: m.first(x) + m.second(x))
        model.first, model.second = Block(), Block()
        assert layers(model, torch.randn(3, 4))["second.fc"].shares_input_of == "first.fc"

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (F.relu, torch.sigmoid),
            (lambda x: x * 2, lambda x: x * 3),
            (lambda x: x * 1, lambda x: x * 1.0),
            (lambda x: x[:2], lambda x: x[1:]),
            (F.relu, lambda x: F.relu(x + 1)),
            (lambda x: F.relu(x.clone(), inplace=True), lambda x: F.relu(x.clone(), inplace=True)),
            (torch.rand_like, torch.rand_like),
            (lambda x: F.dropout(x, training=True), lambda x: F.dropout(x, training=True)),
            (lambda x: x.chunk(3)[0], lambda x: x.chunk(3)[1]),
            (torch.sigmoid, lambda x: torch.sigmoid(x[:])),
            (torch.sigmoid, lambda x: torch.sigmoid(x.permute(0, 1))),
            (torch.sigmoid, lambda x: torch.sigmoid(x.contiguous())),
            (lambda x: x.flatten(1), lambda x: x.flatten(1)),
        ],
        ids=[
            *("kind", "constant", "type", "slice", "value", "in_place", "random", "dropout", "part"),
            *("of_a_slice", "of_a_permute", "of_a_copy", "returns_itself"),
        ],
    )
    def test_others_are_two_nodes(self, first: Operation, second: Operation) -> None:
        assert not shared(first, second)

    def test_a_value_changed_in_between_is_another(self) -> None:
        def forward(m: Model, x: Tensor) -> Tensor:
            y = m.a(F.relu(x))
            x.mul_(2)
            return y + m.b(F.relu(x))

        assert layers(Model(forward), torch.randn(3, 4))["b"].shares_input_of == "b"

    def test_each_call_of_a_module_of_torch_is_a_node_of_its_own(self) -> None:
        relu = nn.ReLU()
        model = Model(lambda m, x: m.a(m.relu(x)) + m.b(m.relu(x)))
        model.relu = relu
        assert layers(model, torch.randn(3, 4))["b"].shares_input_of == "b"


SEEN_THROUGH: dict[str, Operation] = {
    "transposes": lambda x: x.transpose(1, 2).transpose(1, 2),
    "transpose_and_permute": lambda x: x.transpose(1, -1).permute(0, 2, 1),
    "three_permutes": lambda x: x.permute(1, 2, 0).permute(1, 2, 0).permute(1, 2, 0),
    "copied_in_between": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "axes_moved": lambda x: x.movedim(0, 1).swapaxes(0, 1),
    "identity_permute": lambda x: x.permute(0, 1, 2),
    "whole_slice": lambda x: x[:],
    "whole_slices": lambda x: x[:, 0:, ::1],
    "ellipsis": lambda x: x[...],
    "less_zero": lambda x: x - 0,
    "plus_zero": lambda x: 0 + x,
    "times_one": lambda x: x * 1,
}
NODES: dict[str, Operation] = {
    "transpose": lambda x: x.transpose(0, 1),
    "relu_in_between": lambda x: torch.sigmoid(x.transpose(1, 2)).transpose(1, 2),
    "slice_to_the_end": lambda x: x[:, :, :4],
    "slice_of_the_first_axis": lambda x: x[0:2],
    "zero_as_a_float": lambda x: x - 0.0,
    "one_as_a_float": lambda x: x * 1.0,
    "divided_by_one": lambda x: x / 1,
    "negated_twice": lambda x: x.neg().neg(),
    "axis_added_and_removed": lambda x: x.unsqueeze(0).squeeze(0),
    "as_another_tensor": lambda x: x.to(torch.ones(1)),
    "to_a_device": lambda x: x.to(torch.device("cpu")),
    "equal_shape": lambda x: x.view(x.shape),
}


class TestWhatIsSeenThrough:
    @named(**SEEN_THROUGH)
    def test_a_relu_and_a_common_input(self, operation: Operation) -> None:
        model = Model(lambda m, x: m.a(F.relu(x)) + m.b(operation(F.relu(x))))
        found = layers(model, torch.randn(2, 4, 4))
        assert found["b"].fixed_min
        assert found["b"].shares_input_of == "a"

    @named(**SEEN_THROUGH)
    def test_the_way_to_a_batch_norm(self, operation: Operation) -> None:
        model = Model(lambda m, x: m.norm(operation(m.c(x))))
        model.c, model.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        assert layers(model, torch.randn(2, 4, 4))["c"].batch_norm == "norm"

    @named(**NODES)
    def test_what_is_not(self, operation: Operation) -> None:
        model = Model(lambda m, x: m.a(F.relu(x)) + m.b(operation(F.relu(x))))
        found = layers(model, torch.randn(2, 2, 4))
        assert not found["b"].fixed_min
        assert found["b"].shares_input_of == "b"

    @named(view=lambda x: x[:], transposes=lambda x: x.transpose(1, 2).transpose(1, 2), detached=lambda x: x.detach())
    def test_a_relu_that_writes_into_its_argument(self, operation: Operation) -> None:
        """A view has the version of what it shows, which counts the writes."""
        model = Model(lambda m, x: m.b(operation(F.relu(m.a(x), inplace=True))))
        assert layers(model, torch.randn(2, 4, 4))["b"].fixed_min

    def test_one_transpose_and_what_is_left_of_it(self) -> None:
        def forward(m: Model, x: Tensor) -> Tensor:
            x = x.transpose(1, 2)
            return m.a(x) + m.b(x.permute(0, 1, 2))

        assert layers(Model(forward), torch.randn(2, 4, 4))["b"].shares_input_of == "a"

    def test_a_transposed_output_that_is_read_is_a_second_reader(self) -> None:
        model = Model(lambda m, x: (m.norm(y := m.c(x)), torch.sigmoid(y.transpose(1, 2))))
        model.c, model.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        assert layers(model, torch.randn(2, 4, 4))["c"].batch_norm is None

    def test_a_transposed_output_of_the_model_is_a_second_reader(self) -> None:
        model = Model(lambda m, x: (m.norm(y := m.c(x)), y.transpose(1, 2)))
        model.c, model.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        assert layers(model, torch.randn(2, 4, 4))["c"].batch_norm is None

    def test_a_transposed_weight_that_is_read_is_read_from_outside(self) -> None:
        model = Model(lambda m, x: m.b(x @ m.a.weight.t()))
        assert list(layers(model, torch.randn(3, 4))) == ["b"]


@named(
    function=lambda x: F.threshold(x, 0, 0),
    in_place=lambda x: F.threshold(x.clone(), 0.0, 0.0, inplace=True),
    module=nn.Threshold(0, 0),
)
def test_a_threshold_of_zero_is_a_relu(operation: Operation) -> None:
    assert layers(Model(lambda m, x: m.b(operation(m.a(x)))), torch.randn(3, 4))["b"].fixed_min


@pytest.mark.parametrize(("threshold", "value"), [(0.1, 0), (0, 0.1), (-1, 0)])
def test_another_threshold_is_none(threshold: float, value: float) -> None:
    model = Model(lambda m, x: m.b(F.threshold(m.a(x), threshold, value)))
    assert not layers(model, torch.randn(3, 4))["b"].fixed_min


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
class TestBatchFirst:
    """The exported graph transposes the input of such a layer."""

    def plan(self, kind: Any, forward: Callable[..., Any], batch_first: bool = True) -> Any:
        model = Model(forward)
        for name in "pqrs":
            setattr(model, name, kind(4, 4, batch_first=batch_first))
        return layers(model, torch.randn(2, 3, 4))

    def test_a_relu_before_it_does_not_fix_the_lower_clip(self, kind: Any) -> None:
        found = self.plan(kind, lambda m, x: m.p(F.relu(x))[0])
        assert not found["p"].fixed_min
        assert self.plan(kind, lambda m, x: m.p(F.relu(x))[0], batch_first=False)["p"].fixed_min

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_it_shares_with_no_other_reader(self, kind: Any, batch_first: bool) -> None:
        def forward(m: Model, x: Tensor) -> list[Tensor]:
            return [m.a(x), m.b(x), *(layer(x)[0] for layer in (m.p, m.q, m.r, m.s))]

        owners = {name: layer.shares_input_of for name, layer in self.plan(kind, forward, batch_first).items()}
        recurrent = {name: name if batch_first else "p" for name in "pqrs"}
        assert owners == {"a": "a", "b": "a"} | recurrent

    def test_a_transpose_before_it_takes_that_back(self, kind: Any) -> None:
        def forward(m: Model, x: Tensor) -> list[Tensor]:
            x = F.relu(x)
            swapped = x.transpose(0, 1)
            return [m.a(x), m.b(x), *(layer(swapped)[0] for layer in (m.p, m.q, m.r, m.s))]

        found = self.plan(kind, forward)
        assert found["p"].fixed_min
        assert {found[name].shares_input_of for name in "pqrs"} == {"p"}

    def test_the_hidden_state_has_its_own_flag(self, kind: Any) -> None:
        def forward(m: Model, x: Tensor) -> Tensor:
            h = F.relu(x[:, :1].transpose(0, 1).contiguous() - 1)
            return m.p(x, (h, h) if kind is nn.LSTM else h)[0]

        found = self.plan(kind, forward)["p"]
        assert (found.fixed_min, found.fixed_min_hidden) == (False, True)
