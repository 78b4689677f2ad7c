"""Whatever runs can be converted: unusual inputs and outputs, hooks, lazy and stateful modules, wrappers."""

from __future__ import annotations

import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, prepare_qat, quantized_layers
from tests.graph.models import Model, image, layers


@dataclass
class Features:
    """A dataclass that torch's pytree does not know."""

    result: Tensor
    raw: Any = None


def wrapped(wrap: Callable[[Tensor], Any]) -> Model:
    def forward(m: Model, x: Tensor) -> Any:
        y = m.conv(x)
        return Features(m.bn(y), wrap(y))

    return Model(forward)


class TestOutputs:
    """What the user gets back counts as read, so nothing of it may be folded away."""

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda y: y,
            Features,
            lambda y: [{"inside": Features(y)}],
            lambda y: SimpleNamespace(y=y),
            lambda y: UserDict(y=y),
            lambda y: {0, y},
        ],
        ids=["dataclass", "dataclass_in_dataclass", "list_and_dict", "object", "mapping", "set"],
    )
    def test_a_convolution_in_the_output_is_not_folded(self, wrap: Callable[[Tensor], Any]) -> None:
        assert layers(wrapped(wrap), image())["conv"].batch_norm is None

    def test_a_convolution_that_is_not_in_the_output_is(self) -> None:
        assert layers(wrapped(lambda _: "text"), image())["conv"].batch_norm == "bn"

    def test_an_output_that_refers_to_itself(self) -> None:
        def loop(y: Tensor) -> list[Any]:
            ring: list[Any] = [y]
            ring.append(ring)
            return ring

        assert layers(wrapped(loop), image())["conv"].batch_norm is None


class TestInputs:
    """What a forward may be called with."""

    def test_a_mapping_that_is_no_dict(self) -> None:
        model = Model(lambda m, x, scale=None: m.a(x) if scale is None else m.a(x) * scale)
        assert list(layers(model, UserDict(x=torch.randn(2, 4), scale=None))) == ["a"]

    def test_a_dataclass(self) -> None:
        model = Model(lambda m, features: m.a(features.result))
        assert list(layers(model, (Features(torch.randn(2, 4)),))) == ["a"]

    def test_token_ids(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        assert list(layers(model, torch.tensor([[0, 4]]))) == ["1"]

    def test_a_layer_called_with_integers_fails_as_in_float(self) -> None:
        model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.randn(2, 4))
        with pytest.raises(RuntimeError, match="same dtype"):
            model.train()(torch.ones(2, 4, dtype=torch.long))

    def test_integers_that_a_hook_of_the_layer_casts(self) -> None:
        model = nn.Sequential(nn.Linear(4, 2))
        model[0].register_forward_pre_hook(lambda _, args: args[0].float())
        converted = prepare_qat(model, None, torch.ones(2, 4, dtype=torch.long)).train()
        assert converted(torch.ones(2, 4, dtype=torch.long)).dtype == torch.float32


class TestHooks:
    """Users' hooks are part of the data flow: ours are directly around the forward."""

    def test_a_hook_that_changes_the_input_is_before_the_layer(self) -> None:
        model = Model(lambda m, x: m.b(m.a(x)))
        model.b.register_forward_pre_hook(lambda _, args: torch.relu(args[0]))
        assert layers(model, torch.randn(2, 4))["b"].fixed_min

    def test_a_hook_that_changes_the_output_is_behind_the_layer(self) -> None:
        model = Model(lambda m, x: m.bn(m.conv(x)))
        model.conv.register_forward_hook(lambda _m, _args, y: y * 2)
        assert layers(model, image())["conv"].batch_norm is None

    def test_a_layer_that_fails_and_is_caught_hides_nothing_behind_it(self) -> None:
        def forward(m: Model, x: Tensor) -> Tensor:
            try:
                m.a(x)
            except RuntimeError:
                x = m.conv(x)
            return m.bn(x)

        assert layers(Model(forward), image())["conv"].batch_norm == "bn"


class TestModulesThatChange:
    """Layers that the first forward builds, and modules with a memory."""

    def test_lazy_layers_and_their_batch_norm(self) -> None:
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
        converted = prepare_qat(model, None, image()).train()
        converted(image())
        assert list(QuantRecord.from_model(converted)) == ["0", "3"]
        assert layers(model, image())["0"].batch_norm == "1"

    def test_layers_that_the_forward_makes_when_it_runs_first(self) -> None:
        def forward(m: Model, x: Tensor) -> Tensor:
            if not hasattr(m, "late"):
                m.late = nn.Linear(4, 3)
            return m.late(m.a(x))

        assert list(quantized_layers(prepare_qat(Model(forward), None, torch.randn(2, 4)))) == ["a", "late"]

    def test_a_state_that_the_forward_keeps_is_not_that_of_the_example(self) -> None:
        def forward(m: Model, x: Tensor) -> Tensor:
            y = m.a(x if m.memory is None else x + m.memory)
            m.memory, m.last = y, y
            return m.b(y)

        model = Model(forward)
        model.memory = None
        converted = prepare_qat(model, None, torch.randn(2, 4))
        assert model.memory is None
        assert not hasattr(model, "last")
        assert converted.train()(torch.randn(3, 4)).shape == (3, 4)

    @pytest.mark.parametrize(
        "buffer",
        [torch.eye(4).to_sparse(), torch.ones(4, dtype=torch.complex64), torch.ones(4).to(torch.float8_e4m3fn)],
        ids=["sparse", "complex", "float8"],
    )
    def test_buffers_of_any_kind(self, buffer: Tensor) -> None:
        model = Model(lambda m, x: m.a(x))
        model.register_buffer("extra", buffer)
        assert list(layers(model, torch.randn(2, 4))) == ["a"]

    def test_a_model_that_cannot_be_copied_is_converted_in_place_as_by_amct(self) -> None:
        model = Model(lambda m, x: m.a(x))
        model.lock = threading.Lock()
        with pytest.warns(UserWarning, match=r"Model cannot be copied \(TypeError: .*converted in place"):
            assert prepare_qat(model, None, torch.randn(2, 4)) is model

    def test_a_layer_with_old_style_weight_norm_is_copied_and_trains_in_float(self) -> None:
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
        converted = prepare_qat(model, None, torch.randn(2, 4)).train()
        converted(torch.randn(2, 4)).sum().backward()
        assert list(quantized_layers(converted)) == ["1"]
        assert converted[0].weight_g.grad is not None
        assert converted[0].weight_v.grad is not None


@pytest.mark.parametrize(
    "relu",
    [torch.compile(torch.relu, backend="eager"), torch.jit.script(nn.ReLU())],
    ids=["compiled_function", "scripted_module"],
)
def test_compiled_and_scripted_parts_without_layers_are_looked_through(relu: Callable[[Tensor], Tensor]) -> None:
    model = Model(lambda m, x: m.b(relu(m.a(x))))
    model.relu = relu
    assert layers(model, torch.randn(2, 4))["b"].fixed_min


def test_a_wrapper_such_as_data_parallel_prefixes_the_names() -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)), device_ids=[])
    assert list(layers(model, torch.randn(2, 4))) == ["module.0"]


def test_an_embedding_may_share_its_weight_with_a_linear_layer() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    converted = prepare_qat(model, None, torch.tensor([[0, 4]])).train()
    converted(torch.tensor([[1, 2]])).sum().backward()
    assert list(quantized_layers(converted)) == ["1"]
    assert converted[0].weight is converted[1].weight


def test_inputs_that_are_on_one_of_the_model_s_devices_stay_there() -> None:
    model = Model(lambda m, x, y: (m.a(x), m.b(y)))
    model.b.to("meta")
    assert list(layers(model, (torch.randn(2, 4), torch.randn(2, 4, device="meta")))) == ["a", "b"]
