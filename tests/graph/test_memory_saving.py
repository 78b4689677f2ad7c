"""Models that save memory: built on the meta device and filled later, or running their forwards twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amct_lightning import QuantRecord, prepare_qat
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.modules import activation_quantizers
from tests.graph.models import Model, image, layers


class Last(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def forward(self, output: tuple[Tensor, Any]) -> Tensor:
        return output[0]


class TestMeta:
    """Models without memory of their own: observed, converted, and materialized later."""

    def build(self, device: str) -> nn.Module:
        with torch.device(device):
            return nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.LSTM(16, 4), Last(), nn.Linear(4, 2)
            )

    @pytest.fixture(params=["arq_retrain", "ulq_retrain"])
    def choices(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return {"weights": {"algo": request.param}, "layers": {"6": {"activations": {"clip_max": 2, "clip_min": -1}}}}

    def test_the_plan_is_that_of_the_real_model(self, choices: dict[str, Any]) -> None:
        assert make_plan(self.build("meta"), None, image()) == make_plan(self.build("cpu"), None, image())

    @pytest.mark.parametrize("trained", [False, True], ids=["float_state", "quantized_state"])
    @pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
    def test_a_state_loaded_after_the_conversion_makes_it_a_correct_model(
        self, choices: dict[str, Any], trained: bool, assign: bool
    ) -> None:
        float_model = self.build("cpu")
        reference = prepare_qat(float_model, choices, image()).train()
        x, state = image(), float_model.state_dict()
        if trained:
            reference(x)
            state = copy.deepcopy(reference.state_dict())
        model = prepare_qat(self.build("meta"), choices, image()).train()
        if not assign:
            for quantizer in activation_quantizers(model.to_empty(device="cpu")).values():
                assert quantizer.calibrating == (quantizer.clip is None)
        model.load_state_dict(state, assign=assign)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        for _ in range(2):
            assert torch.equal(model(x), reference(x))
        assert QuantRecord.from_model(model) == QuantRecord.from_model(reference)
        assert not any(bool(q.nonfinite) for q in activation_quantizers(model).values())

    def test_a_forward_that_looks_at_values_is_refused_with_a_remedy(self) -> None:
        with torch.device("meta"):
            model = Model(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x))
        with pytest.raises(RuntimeError, match=r"on the meta device.*after its weights are loaded"):
            make_plan(model, None, torch.randn(2, 4))


@pytest.mark.parametrize("reentrant", [False, True])
class TestCheckpointing:
    """Activation checkpointing runs forwards twice."""

    def build(self, mode: bool | None) -> nn.Module:
        def block(layer: nn.Module, x: Tensor) -> Tensor:
            def function(z: Tensor) -> Tensor:
                return torch.relu(layer(z))

            return function(x) if mode is None else checkpoint(function, x, use_reentrant=mode)

        torch.manual_seed(0)
        return Model(lambda m, x: block(m.b, block(m.a, x)))

    def test_the_data_flow_is_seen_through_it(self, reentrant: bool) -> None:
        assert layers(self.build(reentrant), torch.randn(2, 4))["b"].fixed_min

    @pytest.mark.parametrize("batch_num", [1, 3])
    def test_training_is_the_same_to_the_bit(self, reentrant: bool, batch_num: int) -> None:
        """The second forward, within the backward pass, is not another calibration batch."""
        batches = [torch.randn(3, 4, requires_grad=True) for _ in range(5)]
        losses: dict[bool | None, list[float]] = {}
        for mode in (None, reentrant):
            model = prepare_qat(self.build(mode), {"batch_num": batch_num}, batches[0]).train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for batch in batches:
                loss = model(batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.setdefault(mode, []).append(loss.item())
        assert losses[None] == losses[reentrant]
