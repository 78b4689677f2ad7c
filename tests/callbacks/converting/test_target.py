"""The target of the callback: checked before training, and kept by checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from amct_lightning import QuantRetrainCallback, conversion_report, load_qat_checkpoint, quantized_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader

FALLBACK = {"target": "950", "on_unsupported": "fallback"}


def bits_of(model: object) -> set[str]:
    return {row.bits for row in conversion_report(model).rows}  # type: ignore[arg-type]


def test_it_is_refused_before_any_training(make_trainer: TrainerFactory) -> None:
    model = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback("A8W4", target="950")])
    with pytest.raises(ValueError, match=r"^A8W4: target 950 .*the matrix unit has no INT4"):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "910"}, r"QuantRetrainCallback: target='910': there is no such target"),
        ({"on_unsupported": "no"}, r"QuantRetrainCallback\(on_unsupported='no'\)"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantRetrainCallback(**options)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*INT8 is used for.*", "ignore:.*INT8 is used instead of INT4.*")
def test_a_run_that_fell_back_resumes_and_tests_as_it_was(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model, path = Net(), tmp_path / "last.ckpt"
    trainer = make_trainer(callbacks=[QuantRetrainCallback("A8W4", **FALLBACK)])  # type: ignore[arg-type]
    trainer.fit(model, loader())
    trainer.test(model, loader(), verbose=False)
    trainer.save_checkpoint(path)
    assert bits_of(model) == {"A8W8"}
    assert conversion_report(model).target == conversion_report(load_qat_checkpoint(Net, path)).target == "950"
    again = Net()
    callback = QuantRetrainCallback("A8W4", **FALLBACK)  # type: ignore[arg-type]
    make_trainer(callbacks=[callback], max_epochs=3).fit(again, loader(), ckpt_path=path)
    assert bits_of(again) == {"A8W8"}
    other = make_trainer(callbacks=[QuantRetrainCallback("A8W4")], max_epochs=3)
    with pytest.raises(ValueError, match="quantized differently from the model"):
        other.fit(Net(), loader(), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:.*INT8 is used instead of INT4.*")
def test_a_checkpoint_is_checked_for_a_target_that_it_was_not_made_for(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    trainer = make_trainer(callbacks=[QuantRetrainCallback("A8W4")])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"^the checkpoint: target 950 .* does not run as configured"):
        make_trainer(callbacks=[QuantRetrainCallback(target="950")]).validate(Net(), loader(), ckpt_path=path)
    model = Net()
    with pytest.warns(UserWarning, match=r"the checkpoint: target A2 .*worth a second look"):
        make_trainer(callbacks=[QuantRetrainCallback(target="A2")]).validate(
            model, loader(), ckpt_path=path, verbose=False
        )
    assert conversion_report(model).target == "A2"
