"""``target="serving"``: a Linear gets a scale per output channel, AMCT's files may ask for it, the rest is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import (
    QuantRetrainCallback,
    RetrainConfig,
    conversion_report,
    create_quant_retrain_config,
    create_quant_retrain_model,
    prepare_qat,
)
from amct_lightning.config import LayerConfig
from amct_lightning.targets import TARGETS

SERVERS = [name for name, target in TARGETS.items() if target.serves]
X = torch.randn(2, 4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def by_channel(model: nn.Module) -> list[bool | None]:
    return [row.channel_wise for row in conversion_report(model).rows]


@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize(
    "config", [None, "INT8", {"batch_num": 2}, RetrainConfig(layers={"0": LayerConfig()})], ids=repr
)
def test_a_linear_has_a_scale_per_channel_where_nothing_else_is_said(target: Any, config: Any) -> None:
    model = prepare_qat(network(), config, X, target=target)
    assert set(by_channel(model)[: 1 if isinstance(config, RetrainConfig) else 2]) == {True}
    assert conversion_report(model).target == target
    assert set(by_channel(prepare_qat(network(), config, X))) <= {False, None}


def test_one_scale_is_had_by_asking_for_it() -> None:
    choices = {"weights": {"channel_wise": False}, "layers": {"2": {"weights": {"channel_wise": True}}}}
    assert by_channel(prepare_qat(network(), choices, X, target="serving")) == [False, True]


@pytest.mark.parametrize("asked", [False, True])
def test_amct_s_json_may_ask_for_it_and_has_one_scale_otherwise(tmp_path: Path, asked: bool) -> None:
    file, record = tmp_path / "config.json", str(tmp_path / "record.txt")
    create_quant_retrain_config(str(file), network(), X, target="serving")
    content = json.loads(file.read_text())
    assert content["2"]["retrain_weight_config"]["channel_wise"] is False
    content["2"]["retrain_weight_config"]["channel_wise"] = asked
    file.write_text(json.dumps(content))
    model = create_quant_retrain_model(str(file), network(), record, X, target="serving")
    assert by_channel(model) == [False, asked]
    if asked:
        with pytest.raises(ValueError, match="a Linear layer can not be channel-wise, but for target serving"):
            create_quant_retrain_model(str(file), network(), record, X, target="A2")


@pytest.mark.parametrize(("target", "expected"), [("serving", True), (None, False)])
def test_amct_s_cfg_may_ask_for_it_for_all_layers(tmp_path: Path, target: Any, expected: bool) -> None:
    cfg, file = tmp_path / "simple.cfg", tmp_path / "config.json"
    cfg.write_text("retrain_weight_quant_config: { arq_retrain: { channel_wise: true } }")
    create_quant_retrain_config(str(file), network(), X, str(cfg), target=target)
    config = RetrainConfig.from_json(file)
    assert [layer.retrain_weight_config.channel_wise for layer in config.values()] == [expected, expected]
    assert by_channel(prepare_qat(network(), cfg, X, target=target)) == [expected, expected]


def test_what_servers_do_not_load_is_refused_with_its_source_or_stays_in_float() -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(12, 2)), torch.randn(2, 2, 3)
    message = r"target serving \(vllm-ascend, SGLang, MindIE\).*'0' \(Conv1d, A8W8\): .*linear layers only \(\[read\] "
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, None, x, target="serving")
    with pytest.warns(UserWarning, match=r"INT8 is used for '2' and '0' stays in float\.$"):
        qat = prepare_qat(model, "A8W4", x, target="serving", on_unsupported="fallback")
    assert [row.bits for row in conversion_report(qat).rows] == ["", "A8W8"]
    with pytest.raises(ValueError, match=r"'0' \(Linear, A16W8\), '2'.*no type with INT16 activations"):
        prepare_qat(network(), "A16W8", X, target="serving")


ACTIVATIONS = {"per_token": {"algo": "per_token"}, "none": {"algo": "none"}, "symmetric": {"symmetric": True}}


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_what_servers_load_beside_learned_clips_goes_without_a_word(activations: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_qat(network(), {"activations": ACTIVATIONS[activations]}, X, target="serving")


def test_weights_alone_of_int4_are_not_in_ascend_v1() -> None:
    config = {"activations": {"algo": "none"}, "weights": {"dst_type": "INT4"}}
    with pytest.warns(UserWarning, match=r"worth a second look: '0' \(Linear, W4\), .*AscendV1 has no type for it"):
        prepare_qat(network(), config, X, target="serving")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback: QuantRetrainCallback, folder: Path, checkpoint: Path | None = None, steps: int = 2) -> Net:
    module = Net()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=2)
    trainer.fit(module, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.parametrize("config", [None, "INT8"])
def test_a_run_goes_on_from_its_checkpoint_with_and_without_the_target(tmp_path: Path, config: Any) -> None:
    options: dict[str, Any] = {"record_file": tmp_path / "record.txt", "config": config}
    first = fit(QuantRetrainCallback(**options, target="serving"), tmp_path)
    assert by_channel(first) == [True, True]
    for target in ("serving", None):
        again = fit(QuantRetrainCallback(**options, target=target), tmp_path, tmp_path / "last.ckpt", steps=3)
        assert by_channel(again) == [True, True]
        assert conversion_report(again).target == "serving"
