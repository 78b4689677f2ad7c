"""LSTM and GRU: calls, states, calibration of the hidden state, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from amct_lightning import QuantRecord, RetrainConfig, calibrate, prepare_qat
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig

KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])


class Net(nn.Module):
    """A recurrent layer whose outputs and last state all matter."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 6, **settings)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return self.rnn(x, hx)


def state_of(kind: type[nn.RNNBase], *shape: int) -> Any:
    h = torch.randn(*shape, 6) * 0.5
    return (h, torch.randn(*shape, 6) * 0.5) if kind is nn.LSTM else h


def flat(output: Any) -> list[Tensor]:
    y, state = output
    return [y, *(state if isinstance(state, tuple) else (state,))]


def quantized(model: nn.Module, *inputs: Any, config: RetrainConfig | None = None) -> nn.Module:
    model = prepare_qat(model, config, inputs).train()
    model(*inputs)
    return model


@KINDS
@pytest.mark.parametrize(
    ("settings", "shape", "state"),
    [
        ({}, (5, 3, 4), (1, 3)),
        ({"batch_first": True}, (3, 5, 4), (1, 3)),
        ({"bias": False}, (5, 3, 4), (1, 3)),
        ({}, (5, 4), (1,)),
        ({"batch_first": True}, (5, 4), (1,)),
        ({}, (1, 3, 4), (1, 3)),
    ],
    ids=["time_first", "batch_first", "no_bias", "unbatched", "unbatched_batch_first", "one_step"],
)
@pytest.mark.parametrize("with_state", [True, False])
def test_the_outputs_are_those_of_the_float_layer_but_for_quantization(
    kind: type[nn.RNNBase], settings: dict[str, Any], shape: tuple[int, ...], state: tuple[int, ...], with_state: bool
) -> None:
    float_model, x = Net(kind, **settings), torch.randn(shape)
    inputs = (x, state_of(kind, *state)) if with_state else (x,)
    fine = LayerConfig(retrain_data_config=DataConfig(dst_type="INT16"))
    model = quantized(float_model, *inputs, config=RetrainConfig(layers={"rnn": fine}))
    for here, there in zip(flat(model(*inputs)), flat(float_model(*inputs)), strict=True):
        assert here.shape == there.shape
        torch.testing.assert_close(here, there, rtol=0.0, atol=0.02)


@KINDS
def test_a_state_given_by_keyword_is_used(kind: type[nn.RNNBase]) -> None:
    class Keyword(Net):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return self.rnn(hx=hx, input=x)

    x, hx = torch.randn(5, 3, 4), state_of(kind, 1, 3)
    model = quantized(Keyword(kind), x, hx)
    assert not torch.equal(model(x, hx)[0], model(x)[0])


@KINDS
def test_the_weights_train(kind: type[nn.RNNBase]) -> None:
    """AMCT gives them no gradient."""
    x = torch.randn(5, 3, 4)
    model = quantized(Net(kind), x)
    model(x)[0].square().sum().backward()
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        assert model.rnn.get_parameter(name).grad.abs().sum() > 0


@KINDS
def test_the_hidden_state_is_calibrated_on_what_the_float_layer_gives_to_the_next_step(
    kind: type[nn.RNNBase],
) -> None:
    float_model, x, hx = Net(kind), torch.randn(5, 3, 4), state_of(kind, 1, 3)
    h = (hx[0] if kind is nn.LSTM else hx).detach()
    seen = torch.cat((h, float_model(x, hx)[0][:-1]))
    quantizer = quantized(float_model, x, hx).rnn.hidden_quantizer
    expected = type(quantizer)(num_bits=8)
    expected(seen)
    assert (quantizer.clip_max.item(), quantizer.clip_min.item()) == (
        expected.clip_max.item(),
        expected.clip_min.item(),
    )


@KINDS
def test_the_hidden_state_has_fixed_min_if_a_relu_made_the_initial_one(kind: type[nn.RNNBase]) -> None:
    class Rectified(Net):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            hx = tuple(map(torch.relu, hx)) if isinstance(hx, tuple) else torch.relu(hx)
            return self.rnn(x, hx)

    x, hx = torch.randn(5, 3, 4), state_of(kind, 1, 3)
    layer = quantized(Rectified(kind), x, hx).rnn
    assert (layer.input_quantizer.fixed_min, layer.hidden_quantizer.fixed_min) == (False, True)


@KINDS
@pytest.mark.parametrize("given", [True, False])
def test_a_given_fixed_min_holds_for_input_and_hidden_state(kind: type[nn.RNNBase], given: bool) -> None:
    config = RetrainConfig(layers={"rnn": LayerConfig(retrain_data_config=DataConfig(fixed_min=given))})
    layer = quantized(Net(kind), torch.randn(5, 3, 4), config=config).rnn
    assert (layer.input_quantizer.fixed_min, layer.hidden_quantizer.fixed_min) == (given, given)


@pytest.mark.parametrize(("kind", "order"), [(nn.LSTM, (0, 3, 1, 2)), (nn.GRU, (1, 0, 2))])
def test_the_record_has_the_gates_in_the_order_of_onnx(kind: type[nn.RNNBase], order: tuple[int, ...]) -> None:
    float_model = Net(kind)
    with torch.no_grad():
        for gate, part in enumerate(float_model.rnn.weight_ih_l0.chunk(len(order))):
            part.fill_((gate + 1) * 127.0)
    model = quantized(float_model, torch.randn(5, 3, 4))
    record = QuantRecord.from_model(model)["rnn"]
    assert record.scale_w == [float(gate + 1) for gate in order for _ in range(6)]
    assert len(record.scale_r) == len(record.offset_r) == len(order) * 6


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_one_scale_for_all_stands_in_the_record_once_per_gate(kind: type[nn.RNNBase], gates: int) -> None:
    layer = LayerConfig(retrain_weight_config=WeightConfig(channel_wise=False))
    model = quantized(Net(kind), torch.randn(5, 3, 4), config=RetrainConfig(layers={"rnn": layer}))
    record = QuantRecord.from_model(model)["rnn"]
    assert record.scale_w == [record.scale_w[0]] * gates


@KINDS
def test_a_packed_sequence_is_refused_with_the_remedy(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(5, 3, 4)
    model = quantized(Net(kind), x)
    with pytest.raises(ValueError, match=r"PackedSequence.*pad_packed_sequence"):
        model(pack_padded_sequence(x, torch.tensor([5, 4, 2])))


@KINDS
def test_a_layer_that_is_fed_packed_sequences_is_not_eligible_and_the_reason_is_given(kind: type[nn.RNNBase]) -> None:
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 4, 2]))
    with pytest.raises(ValueError, match=r"'rnn': its input is a PackedSequence"):
        prepare_qat(Net(kind), None, (packed,))


@KINDS
def test_a_state_of_the_wrong_shape_gives_the_float_layer_s_error(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(5, 3, 4)
    model = quantized(Net(kind), x)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        model(x, state_of(kind, 1, 2))


@KINDS
def test_evaluation_before_calibration_is_the_float_layer(kind: type[nn.RNNBase]) -> None:
    float_model, x = Net(kind).eval(), torch.randn(5, 3, 4)
    model = prepare_qat(float_model, None, x).eval()
    with pytest.warns(UserWarning, match="run in float"):
        y = model(x)[0]
    assert torch.equal(y, float_model(x)[0])


@KINDS
def test_a_nonfinite_hidden_state_is_noticed(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(5, 3, 4)
    model = quantized(Net(kind), x)
    with torch.no_grad():
        model.rnn.bias_hh_l0.fill_(float("nan"))
    model(x)
    assert model.rnn.hidden_quantizer.nonfinite


def test_converting_and_running_consumes_no_random_numbers() -> None:
    """AMCT builds a cell in every forward, which draws its initial weights."""
    x = torch.randn(5, 3, 4)
    float_model = Net(nn.LSTM)
    before = torch.get_rng_state()
    quantized(float_model, x)
    assert torch.equal(torch.get_rng_state(), before)


@KINDS
def test_calibrate_sees_the_hidden_states_as_training_does(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    float_model = Net(kind)
    by_training = quantized(float_model, x)
    by_training(x)
    by_calibrate = prepare_qat(float_model, None, (x,))
    calibrate(by_calibrate, [x])
    for name in ("clip_max", "clip_min"):
        assert torch.equal(
            getattr(by_calibrate.rnn.hidden_quantizer, name), getattr(by_training.rnn.hidden_quantizer, name)
        )
    assert by_calibrate.rnn.hidden_quantizer.clip_max < 1.1  # tanh
