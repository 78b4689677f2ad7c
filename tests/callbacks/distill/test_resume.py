"""A run that resumes has the teacher of the run before, or says that it has another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from amct_lightning import QuantRetrainCallback
from tests.callbacks.conftest import Net, TrainerFactory, loader
from tests.callbacks.distill.modules import distilling


def other_weights() -> Net:
    module = Net()
    torch.manual_seed(5)
    module.net[4].reset_parameters()
    return module


def run(make_trainer: TrainerFactory, module: Net, path: Path, ckpt: Path | None = None, **settings: Any) -> Net:
    """Train for two epochs, or the second of them from ``ckpt``."""
    callback = settings.pop("callback", None) or distilling(layers=["net.*"], **settings)
    checkpoints = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    make_trainer(callbacks=[callback, checkpoints], enable_checkpointing=True, max_epochs=2).fit(
        module, loader(), ckpt_path=ckpt
    )
    return module


def equal(a: Net, b: Net) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_it_goes_on_to_the_bit(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    whole = run(make_trainer, Net(), tmp_path / "whole")
    assert equal(whole, run(make_trainer, Net(), tmp_path / "again", tmp_path / "whole" / "epoch=0.ckpt"))


def test_another_teacher_is_refused(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    run(make_trainer, Net(), tmp_path)
    with pytest.raises(ValueError, match=r"another teacher \(with digest \w{12}\) than the module has now .*teacher="):
        run(make_trainer, other_weights(), tmp_path / "again", tmp_path / "epoch=0.ckpt")


def test_the_float_weights_may_come_from_the_file_that_they_came_from_before(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    torch.save(other_weights().state_dict(), tmp_path / "float.pt")

    def callback() -> QuantRetrainCallback:
        return QuantRetrainCallback(float_checkpoint=tmp_path / "float.pt", distill={"weight": 0.5})

    whole = run(make_trainer, Net(), tmp_path / "whole", callback=callback())
    first = tmp_path / "whole" / "epoch=0.ckpt"
    assert equal(whole, run(make_trainer, Net(), tmp_path / "again", first, callback=callback()))


def test_a_file_names_the_teacher_whatever_the_module_has(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    torch.save(other_weights().state_dict(), tmp_path / "float.pt")
    whole = run(make_trainer, Net(), tmp_path / "whole", teacher=tmp_path / "float.pt")
    assert not equal(whole, run(make_trainer, Net(), tmp_path / "untaught"))
    first = tmp_path / "whole" / "epoch=0.ckpt"
    again = run(make_trainer, other_weights(), tmp_path / "again", first, teacher=tmp_path / "float.pt")
    assert equal(whole, again)
    with pytest.warns(UserWarning, match=r"another teacher .* than '.*new.pt'"):
        torch.save(Net().state_dict(), tmp_path / "new.pt")
        run(make_trainer, Net(), tmp_path / "warned", first, teacher=tmp_path / "new.pt")


def test_a_quantized_module_has_no_float_weights_to_teach_with(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    module = run(make_trainer, Net(), tmp_path, callback=QuantRetrainCallback())
    with pytest.raises(ValueError, match=r"Net is quantized already, .* Distill\(teacher='float.ckpt'\)"):
        run(make_trainer, module, tmp_path / "again")
    torch.save(Net().state_dict(), tmp_path / "float.pt")
    run(make_trainer, module, tmp_path / "taught", teacher=tmp_path / "float.pt")
    with pytest.raises(ValueError, match="is of a quantized model and no float checkpoint"):
        run(make_trainer, Net(), tmp_path / "wrong", teacher=tmp_path / "epoch=0.ckpt")


def test_a_run_without_a_teacher_may_get_one(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    alone = run(make_trainer, Net(), tmp_path, callback=QuantRetrainCallback())
    taught = run(make_trainer, Net(), tmp_path / "taught", tmp_path / "epoch=0.ckpt")
    assert not equal(alone, taught)  # which the same epoch had begun


def test_a_checkpoint_is_evaluated_without_a_teacher(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    run(make_trainer, Net(), tmp_path)
    callback = distilling(teacher=tmp_path / "is_not_there.pt")
    make_trainer(callbacks=[callback]).test(Net(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
