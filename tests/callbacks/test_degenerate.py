"""Layers that only 0 reaches in calibration: a warning with name and remedy, or a calibration that waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import amct_lightning as amct
from amct_lightning import QuantRecord, QuantRetrainCallback, calibrate, prepare_qat
from tests.callbacks.conftest import TrainerFactory

MESSAGE = "No range could be calibrated for the inputs of"
ULQ: dict[str, Any] = {"weights": {"algo": "ulq_retrain"}}


class Net(pl.LightningModule):
    """Three layers, of which the middle one begins with 0, so that nothing but 0 reaches the last one at first."""

    def __init__(self, zeros: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
        self.factor = factor
        if zeros:
            for parameter in self.net[2].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.factor * x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(zero_batches: int = 0) -> DataLoader[Any]:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    x[: 8 * zero_batches] = 0
    return DataLoader(TensorDataset(x, y), batch_size=8)


def fit(make_trainer: TrainerFactory, model: Net, batches: Any = None, epochs: int = 1, **settings: Any) -> str:
    """Train; return the warnings about ranges."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(callbacks=[QuantRetrainCallback(**settings)], max_epochs=epochs, log_every_n_steps=100)
        trainer.fit(model, data() if batches is None else batches)
    own = ("No range", "Learned weight scales began", "The weights of", "The range of", "No record")
    return "\n".join(str(w.message) for w in caught if str(w.message).startswith(own))


class TestAsAmct:
    def test_the_layer_behind_zeros_is_named_with_the_remedy_once(self, make_trainer: TrainerFactory) -> None:
        message = fit(make_trainer, Net(), epochs=3)
        assert message.count(MESSAGE) == 1
        assert f"{MESSAGE} 'net.3';" in message
        assert "on_degenerate='wait'" in message
        assert "The weights of 'net.2' were 0" in message

    def test_inputs_that_are_nearly_zero(self, make_trainer: TrainerFactory) -> None:
        model = Net(zeros=False, factor=1e-8)
        assert f"{MESSAGE} 'net.0';" in fit(make_trainer, model)
        assert model.net[0].input_quantizer.clip_max > 100

    def test_good_ranges_are_told_nothing_about(self, make_trainer: TrainerFactory) -> None:
        assert fit(make_trainer, Net(zeros=False)) == ""

    def test_the_first_batch_of_zeros(self, make_trainer: TrainerFactory) -> None:
        assert f"{MESSAGE} 'net.0';" in fit(make_trainer, Net(zeros=False), data(1))

    def test_one_batch_with_values_among_others_makes_a_range(self, make_trainer: TrainerFactory) -> None:
        assert fit(make_trainer, Net(zeros=False), data(1), config={"batch_num": 2}) == ""

    def test_learned_weight_scales_that_begin_with_one(self, make_trainer: TrainerFactory) -> None:
        assert "Learned weight scales began with 1 in 'net.2' (1)" in fit(make_trainer, Net(), config=ULQ)
        assert "Learned" not in fit(make_trainer, Net(zeros=False), config=ULQ)

    def test_clips_that_are_given_too_small(self, make_trainer: TrainerFactory) -> None:
        config = {"activations": {"clip_max": 1e-6, "clip_min": -1e-6}}
        message = fit(make_trainer, Net(zeros=False), config=config)
        assert "The range of the input is too small for a scale of its own in 'net.2' (0 to 1e-06)" in message


class TestWaiting:
    def test_the_layer_calibrates_on_the_first_batch_with_values(self, make_trainer: TrainerFactory) -> None:
        """To the bit as if the batches without values were not there."""
        model = Net(zeros=False)
        seen = Clips()
        waits = QuantRetrainCallback(on_degenerate="wait")
        make_trainer(callbacks=[waits, seen], max_epochs=1).fit(model, data(2))
        expected = prepare_qat(Net(zeros=False).net, None, torch.ones(1, 8))
        calibrate(expected, [list(data(2))[2][0]])
        assert seen.calibrating == [True, True, False, False, False, False]
        assert seen.first == expected[0].input_quantizer.clip_max

    def test_nothing_is_warned_of_and_the_range_is_small(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        message = fit(make_trainer, model, epochs=2, on_degenerate="wait")
        assert MESSAGE not in message
        assert model.net[3].input_quantizer.clip_max < 5

    def test_with_several_batches_only_those_with_values_count(self, make_trainer: TrainerFactory) -> None:
        model, seen = Net(zeros=False), Clips()
        waits = QuantRetrainCallback({"batch_num": 2}, on_degenerate="wait")
        make_trainer(callbacks=[waits, seen], max_epochs=1).fit(model, data(1))
        assert seen.calibrating == [True, True, False, False, False, False]

    def test_it_goes_on_after_a_resume(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        def run(model: Net, epochs: int, ckpt_path: Path | None = None) -> list[bool]:
            seen = Clips()
            callback = QuantRetrainCallback({"batch_num": 2}, on_degenerate="wait")
            trainer = make_trainer(callbacks=[callback, seen], max_epochs=epochs)
            trainer.fit(model, data(5), ckpt_path=ckpt_path)
            trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return seen.calibrating

        through, resumed = Net(zeros=False), Net(zeros=False)
        assert run(through, 2) == [True] * 11 + [False]
        assert run(Net(zeros=False), 1) == [True] * 6
        assert run(resumed, 2, tmp_path / "1.ckpt") == [True] * 5 + [False]
        assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))

    def test_a_layer_that_never_gets_values_is_told_of_at_the_end(self, make_trainer: TrainerFactory) -> None:
        message = fit(make_trainer, Net(zeros=False, factor=0.0), on_degenerate="wait")
        assert "not calibrated after 6 training batches ('net.0')" in message
        assert "on_degenerate='wait'" in message

    def test_another_value_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"on_degenerate='skip'\): must be 'amct' or 'wait'"):
            QuantRetrainCallback(on_degenerate="skip")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"prepare_qat\(on_degenerate='skip'\)"):
            prepare_qat(nn.Linear(2, 2), None, torch.ones(1, 2), on_degenerate="skip")  # type: ignore[arg-type]


class Clips(pl.Callback):
    """Notes after every batch whether the first layer calibrates, and the range that it begins with."""

    def __init__(self) -> None:
        self.calibrating: list[bool] = []
        self.first: Tensor | None = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        quantizer = pl_module.net[0].input_quantizer
        if self.first is None and not quantizer.calibrating:
            self.first = quantizer.clip_max.detach().clone()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.calibrating.append(pl_module.net[0].input_quantizer.calibrating)


class TestPlainPyTorch:
    @pytest.mark.parametrize("on_degenerate", ["amct", "wait"])
    def test_amcts_functions_take_the_choice(self, tmp_path: Path, on_degenerate: Any) -> None:
        config, record, x = str(tmp_path / "c.json"), str(tmp_path / "r.txt"), torch.randn(4, 8)
        amct.create_quant_retrain_config(config, Net().net, x)
        model = amct.create_quant_retrain_model(config, Net().net, record, x, on_degenerate=on_degenerate)
        model.train()(x)
        assert model[3].input_quantizer.calibrating is (on_degenerate == "wait")
        if on_degenerate == "wait":
            with torch.no_grad():
                model[2].weight.fill_(0.1)
            model(x), model.eval()(x)
            assert QuantRecord.load(record)["3"].scale_d < 0.1
        else:
            with pytest.warns(UserWarning, match=f"{MESSAGE} '3';"):
                model.eval()(x)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model.eval()(x)

    def test_a_calibration_without_training_and_a_record_warn(self) -> None:
        x = torch.zeros(4, 8)
        with pytest.warns(UserWarning, match=f"{MESSAGE} '0'"):
            calibrate(prepare_qat(Net().net, None, x), [x])
        model = prepare_qat(Net().net, None, x).train()
        model(x)
        with pytest.warns(UserWarning, match=f"{MESSAGE} '0'"):
            QuantRecord.from_model(model)

    def test_a_calibration_without_training_passes_zeros_by(self) -> None:
        x = torch.randn(4, 8)
        model = prepare_qat(Net(zeros=False).net, None, x, on_degenerate="wait")
        calibrate(model, [torch.zeros(4, 8), x])
        assert model[0].input_quantizer.scale < 1

    def test_the_hidden_state_of_a_recurrent_layer_is_named(self) -> None:
        model = prepare_qat(nn.Sequential(nn.LSTM(4, 3)), None, torch.ones(1, 2, 4)).train()
        model(torch.randn(1, 2, 4))  # a single step, which begins with a state of zeros
        with pytest.warns(UserWarning, match=rf"{MESSAGE} '0 \(hidden state\)'"):
            QuantRecord.from_model(model)


SCRIPT = """
import json, sys, warnings
from pathlib import Path
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from amct_lightning import QuantRetrainCallback
from tests.callbacks.test_degenerate import Net

class Uneven(Net):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 0 or batch_idx == 0 and self.both:
            batch = [batch[0] * 0, batch[1]]
        return super().training_step(batch, batch_idx)

out, found = Path(sys.argv[1]), {}
for name, both, mode in (("amct", False, "amct"), ("one", False, "wait"), ("both", True, "wait")):
    callback = QuantRetrainCallback(record_file=out / "r.txt", on_degenerate=mode)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[callback], default_root_dir=out,
    )
    model = Uneven(zeros=False)
    model.both = both
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8))
    found[name] = {
        "clips": [p.item() for n, p in model.named_parameters() if "clip" in n],
        "warned": [str(w.message) for w in caught if "No range" in str(w.message)],
    }
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


def test_processes_agree_whoever_of_them_has_values(tmp_path: Path) -> None:
    script, root = tmp_path / "train.py", Path(__file__).parents[2]
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("amct", "one", "both"):
        assert ranks[0][name]["clips"] == ranks[1][name]["clips"]
    assert max(ranks[0]["amct"]["clips"]) > 50  # the mean of a range and of scale 1
    assert f"{MESSAGE} 'net.0'" in ranks[0]["amct"]["warned"][0]
    for name in ("one", "both"):
        assert max(ranks[0][name]["clips"]) < 10
        assert ranks[0][name]["warned"] == []
