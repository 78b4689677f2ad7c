"""The numbers of QuantMonitor against independent arithmetic in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amct_lightning import calibrate, prepare_qat
from amct_lightning.callbacks.monitor.layers import FACTORS, Drift, monitored_layers, read_factors
from amct_lightning.callbacks.monitor.metric import QuantStatistics
from amct_lightning.callbacks.monitor.reading import reading_of, sqnr_db
from amct_lightning.callbacks.monitor.sampling import Sampler
from amct_lightning.modules import activation_quantizers
from amct_lightning.monitor_format import LayerReading
from amct_lightning.quantizers import ActivationQuantizer
from tests.operators import Operators


def _read(quantizer: ActivationQuantizer, *batches: Tensor) -> LayerReading:
    statistics = QuantStatistics(1)
    for batch in batches:
        statistics.update(0, batch, quantizer)
    values = [*statistics.collect(distributed=False)[0].tolist(), *[math.nan] * len(FACTORS)]
    return reading_of("layer", quantizer.num_bits, values)


def _reference(x: Tensor, high: float, low: float, bits: int) -> dict[str, float]:
    x, h = x.double(), 2 ** (bits - 1)
    upper, lower = np.float32(max(high, 0)), np.float32(min(low, 0))
    # In float32, as the formula has it: in float64 an offset may be the other neighbour of a tie.
    scale = (upper - lower) / np.float32(2**bits - 1)
    offset = float(np.round(np.float32(-h) - lower / scale))
    scale = float(scale)
    codes = (x / scale + offset).round().clamp(-h, h - 1)
    error = (codes - offset) * scale - x
    return {
        "low": float((x < (-h - offset) * scale).double().mean()),
        "high": float((x > (h - 1 - offset) * scale).double().mean()),
        "used": float(codes.max() - codes.min() + 1) / 2**bits,
        "sqnr": float(10 * torch.log10(x.square().sum() / error.square().sum())),
    }


@settings(max_examples=60, deadline=None)
@example(seed=529, bits=8, high=1.9, low=-1.5, batches=1)  # -h - lower / scale is a tie
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([4, 8, 16]),
    high=st.floats(0.1, 4),
    low=st.floats(-4, -0.1),
    batches=st.integers(1, 3),
)
def test_activation_metrics_are_those_of_plain_arithmetic(
    seed: int, bits: int, high: float, low: float, batches: int
) -> None:
    x = torch.randn(batches, 97, generator=torch.Generator().manual_seed(seed))
    reading, expected = _read(ActivationQuantizer(bits, clip=(high, low)), *x), _reference(x, high, low, bits)
    one = 1 / x.numel() + 1e-6  # a value at the very end of a range, or halfway between two levels, may go either way
    assert reading.saturation_low == pytest.approx(expected["low"], abs=one)
    assert reading.saturation_high == pytest.approx(expected["high"], abs=one)
    assert reading.utilisation == pytest.approx(expected["used"], abs=2.01 / 2**bits)
    assert reading.sqnr_input_db == pytest.approx(expected["sqnr"], abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    quantizer, x = ActivationQuantizer(8, clip=(3.0, -3.0)), torch.randn(64).to(dtype)
    assert _read(quantizer, x) == _read(quantizer, x.float())


def test_half_precision_squares_do_not_overflow() -> None:
    reading = _read(ActivationQuantizer(8, clip=(6e4, -6e4)), torch.full((1000,), 5e4, dtype=torch.float16))
    assert reading.sqnr_input_db is not None
    assert reading.sqnr_input_db > 30


def test_a_tensor_of_zeros_has_no_ratio() -> None:
    reading = _read(ActivationQuantizer(8, clip=(1.0, -1.0)), torch.zeros(5))
    assert (reading.sqnr_input_db, reading.saturation, reading.utilisation) == (None, 0.0, 1 / 256)


def test_a_tensor_without_error_has_an_infinite_ratio() -> None:
    assert _read(ActivationQuantizer(4, clip=(7.5, -7.5)), torch.tensor([1.0, -3.0])).sqnr_input_db == math.inf


def test_empty_tensors_add_nothing() -> None:
    quantizer, x = ActivationQuantizer(8, clip=(1.0, -1.0)), torch.randn(9)
    assert _read(quantizer, torch.zeros(0, 4)) == LayerReading("layer")
    assert _read(quantizer, x, torch.zeros(0)) == _read(quantizer, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_makes_the_ratio_unknown(bad: float) -> None:
    reading = _read(ActivationQuantizer(8, clip=(1.0, -1.0)), torch.tensor([0.5, bad]))
    assert reading.sqnr_input_db is None
    assert reading.saturation_high == (0.5 if bad == math.inf else 0.0)


def test_ratios_of_extreme_sums() -> None:
    assert sqnr_db(3e38, 1e-45) == pytest.approx(834.8, abs=0.1)
    assert sqnr_db(1.0, math.nan) is None
    assert sqnr_db(math.inf, 1.0) is None


def test_measuring_leaves_the_quantizer_alone() -> None:
    quantizer = ActivationQuantizer(8, clip=(1.0, -1.0)).train()
    with torch.no_grad():
        quantizer.clip_max.fill_(-0.5)  # what learning can make of it; a forward would repair it
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    reading = _read(quantizer, torch.tensor([0.5, 5.0]))
    assert reading.saturation_high == 0.5
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **kwargs: bool) -> None:
        super().__init__()
        self.rnn = kind(3, 4, **kwargs)

    def forward(self, x: Tensor, hx: object = None) -> Tensor:
        return self.rnn(x, hx)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given_state", [False, True])
def test_hidden_states_are_those_that_the_steps_read(
    kind: type[nn.Module], batch_first: bool, given_state: bool
) -> None:
    x = torch.randn(5, 5, 3)
    hx: object = None
    if given_state:
        hx = torch.randn(1, 5, 4)
        hx = (hx, torch.randn(1, 5, 4)) if kind is nn.LSTM else hx
    model = prepare_qat(_Recurrent(kind, batch_first=batch_first), {"batch_num": 1}, x).train()
    model(x, hx)
    read: list[Tensor] = []
    quantizer = model.rnn.hidden_quantizer
    quantize = quantizer.quantize
    quantizer.quantize = lambda h, *clips: (read.append(h.detach()), quantize(h, *clips))[1]
    rows = monitored_layers(model)
    sampler = Sampler(rows, torch.device("cpu"))
    sampler.attach()
    model(x, hx)
    sampler.detach()
    found = sampler.collect(Drift(), distributed=False)
    assert [row.layer for row in found] == ["rnn", "rnn (hidden state)"] == list(activation_quantizers(model))
    del quantizer.quantize
    expected = _read(quantizer, torch.stack(read))
    assert found[1].sqnr_input_db == pytest.approx(expected.sqnr_input_db, abs=1e-4)
    assert (found[1].saturation, found[1].utilisation) == (expected.saturation, expected.utilisation)
    assert found[0].sqnr_input_db == pytest.approx(_read(model.rnn.input_quantizer, x).sqnr_input_db, abs=1e-4)


def test_an_unbatched_sequence_by_keyword_is_seen() -> None:
    class Keywords(_Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(input=x, hx=torch.ones(1, 4))[0]

    x = torch.randn(6, 3)
    model = prepare_qat(Keywords(nn.GRU), None, x)
    calibrate(model, [x])
    sampler = Sampler(monitored_layers(model), torch.device("cpu"))
    sampler.attach()
    model.train()(x)
    assert all(row.sqnr_input_db for row in sampler.collect(Drift(), distributed=False))


class _Shared(nn.Module):
    """Two layers that read one tensor; the second in module order runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.end = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        return self.end(self.q(x) + k)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_checkpointing_repeats_is_counted_once(reentrant: bool) -> None:
    x = torch.randn(8, 4)
    model = prepare_qat(nn.Sequential(nn.Linear(4, 3)), None, x).train()
    calibrate(model, [x])
    sampler = Sampler(monitored_layers(model), torch.device("cpu"))
    sampler.attach()
    checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert sampler.statistics.table[0, 0] == x.numel()


def test_a_shared_quantizer_is_counted_once() -> None:
    x = torch.randn(8, 4)
    model = prepare_qat(_Shared(), None, x)
    calibrate(model, [x])
    rows = monitored_layers(model)
    sampler = Sampler(rows, torch.device("cpu"))
    sampler.attach()
    with torch.no_grad():
        model.train()(x)
    counted = sampler.statistics.table[:, 0].tolist()
    found = sampler.collect(Drift(), distributed=False)
    assert dict(zip([row.name for row in rows], counted, strict=True)) == {"q": 32, "k": 0, "end": 32}
    assert (found[0].clip_max is None, found[1].clip_max is None) == (False, True)
    assert found[1].sqnr_weight_db is not None


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("channel_wise", [False, True])
def test_weights_are_measured_with_the_scales_of_the_layer(algo: str, channel_wise: bool) -> None:
    x = torch.randn(2, 4, 6)
    net = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv1d(6, 4, 3))
    weights = {"algo": algo, "channel_wise": channel_wise, "dst_type": "INT8"}
    model = prepare_qat(net, {"weights": weights}, x).train()
    model(x)
    for row in monitored_layers(model):
        factors = dict(zip(FACTORS, read_factors(row, Drift()).tolist(), strict=True))
        weight = row.layer.weight.detach()
        quantized = row.weight_quantizer(weight).detach()
        expected = 10 * torch.log10(weight.square().sum() / (weight - quantized).square().sum())
        assert sqnr_db(factors["weight_signal"], factors["weight_noise"]) == pytest.approx(float(expected), abs=1e-3)
        assert factors["weight_scale_mean"] == pytest.approx(float(row.weight_quantizer.scale.detach().mean()))


def test_drift_counts_from_the_end_of_the_last_calibration() -> None:
    x = torch.randn(8, 4)
    model = prepare_qat(nn.Sequential(nn.Linear(4, 3)), None, x).train()
    (row,), drift = monitored_layers(model), Drift()

    def moved() -> tuple[float, float]:
        factors = dict(zip(FACTORS, read_factors(row, drift).tolist(), strict=True))
        return factors["clip_drift"], factors["weight_scale_drift"]

    drift.note([row])
    assert all(map(math.isnan, moved()))
    calibrate(model, [x])
    drift.note([row])
    assert moved() == (0.0, 0.0)
    with torch.no_grad():
        row.layer.weight *= 1.5
        width = float(row.quantizer.clip_max - row.quantizer.clip_min)
        row.quantizer.clip_max += 0.1 * width
        row.quantizer.clip_min += 0.1 * width  # a range that only moves has drifted too
    drift.note([row])
    assert moved() == (pytest.approx(0.2, abs=1e-4), pytest.approx(0.5, abs=1e-4))
    row.quantizer.recalibrate()
    drift.note([row])
    assert all(map(math.isnan, moved()))
    calibrate(model, [x])
    drift.note([row])
    assert moved() == (0.0, 0.0)


def test_between_intervals_nothing_is_read_on_the_host() -> None:
    x = torch.randn(2, 2, 6, 6)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = prepare_qat(net, None, x).train()
    sampler, drift = Sampler(monitored_layers(model), torch.device("cpu")), Drift()
    with Operators() as operators:
        for _ in range(2):
            drift.note(sampler.rows)
            sampler.attach()
            model(x)
            sampler.detach()
            drift.note(sampler.rows)
    assert sampler.statistics.table[0, 0] == 2 * x.numel()
    assert operators.host_reads == {}


def test_between_intervals_no_value_is_needed_at_all() -> None:
    x = torch.randn(2, 8)
    model = prepare_qat(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), None, x).train()
    calibrate(model, [x])
    states = [(q.calibrating, q.fresh) for q in activation_quantizers(model).values()]
    model.to("meta")  # tensors without values: whatever reads one fails
    assert [(q.calibrating, q.fresh) for q in activation_quantizers(model).values()] == states
    sampler, drift = Sampler(monitored_layers(model), torch.device("meta")), Drift()
    drift.note(sampler.rows)
    sampler.attach()
    model(x.to("meta"))
    sampler.detach()
    assert drift.clips.keys() == {"0", "2"}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sampler.collect(drift, distributed=False)
