"""What the teacher is: the float model as it was converted, and no part of what is trained, saved and shared."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import Distill, QuantRetrainCallback
from amct_lightning.callbacks.distill.listening import _nothing
from amct_lightning.callbacks.distill.teacher import Teacher, make_teacher
from tests.callbacks.conftest import Net, TrainerFactory, loader
from tests.callbacks.distill.modules import Keep, Taught, by_hand, distilling, float_copy


def teacher_of(callback: QuantRetrainCallback) -> Teacher:
    teacher = cast(Any, callback)._distillation._teacher
    assert isinstance(teacher, Teacher)
    return teacher


def test_module_checkpoint_and_optimizer_are_as_without_it(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    names = []
    for callback in (QuantRetrainCallback(), distilling(layers=["net.*"])):
        module = Net()
        trainer = make_trainer(callbacks=[callback])
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        groups = saved["optimizer_states"][0]["param_groups"]
        names.append((list(module.state_dict()), list(saved["state_dict"]), [len(g["params"]) for g in groups]))
        assert all("teacher" not in name for name, _ in module.named_modules())
    assert names[0] == names[1]


def test_it_stays_as_it_was_converted_and_shares_nothing(make_trainer: TrainerFactory) -> None:
    module, callback = Net(), distilling()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_trainer(callbacks=[callback]).fit(module, loader())
    part = teacher_of(callback).part("")
    assert part.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in part.state_dict().items())
    assert not torch.equal(module.net[0].weight, before["net.0.weight"])
    assert not any(inner.training for inner in part.modules())
    assert not any(parameter.requires_grad for parameter in part.parameters())
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in part.state_dict().values()}


def test_a_second_fit_goes_on_with_the_same_teacher(make_trainer: TrainerFactory) -> None:
    module, callback = Taught(), distilling()
    teacher = float_copy(module.net)
    make_trainer(callbacks=[callback], max_epochs=1).fit(module, loader())
    keep = Keep()
    make_trainer(callbacks=[callback, keep], max_epochs=1, log_every_n_steps=1).fit(module, loader())
    wanted = 0.5 * by_hand(module.given[-1], teacher(module.seen[-1]))
    torch.testing.assert_close(keep.metrics[-1].double(), wanted.detach(), rtol=1e-4, atol=1e-6)
    assert "training_step" not in vars(module)
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.net)


def test_a_validation_before_the_fit_leaves_it_its_teacher(make_trainer: TrainerFactory) -> None:
    module, callback = Net(), distilling()
    before = module.net[0].weight.clone()
    trainer = make_trainer(callbacks=[callback])
    trainer.validate(module, loader(), verbose=False)
    trainer.fit(module, loader())
    assert torch.equal(cast(Tensor, teacher_of(callback).part("net.0").weight), before)


def test_only_the_part_that_is_called_is_kept(make_trainer: TrainerFactory) -> None:
    class WithMore(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(100, 100)

    callback = QuantRetrainCallback(submodule="net", distill=Distill(module="net"))
    make_trainer(callbacks=[callback]).fit(WithMore(), loader())
    assert isinstance(teacher_of(callback).part("net"), nn.Sequential)
    with pytest.raises(AttributeError):
        teacher_of(callback).part("more")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_in_another_dtype_or_from_the_host_it_answers_as_such_a_model_does(
    make_trainer: TrainerFactory, offload: bool, dtype: str | None
) -> None:
    module, keep = Taught(), Keep()
    teacher = float_copy(module.net).to(getattr(torch, dtype or "float32"))
    callback = distilling(offload=offload, dtype=dtype)
    make_trainer(callbacks=[callback, keep], log_every_n_steps=1, max_epochs=1).fit(module, loader())
    x = module.seen[-1]
    wanted = teacher(x.to(teacher[0].weight.dtype))  # type: ignore[index,union-attr]
    assert wanted.dtype == (torch.bfloat16 if dtype else torch.float32)
    expected = 0.5 * by_hand(module.given[-1], wanted)
    torch.testing.assert_close(keep.metrics[-1].double(), expected.detach(), rtol=1e-4, atol=1e-6)
    assert torch.get_default_dtype() == torch.float32


def test_inputs_that_the_forward_writes_to_are_its_own(make_trainer: TrainerFactory) -> None:
    class Writes(Taught):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch.pop("x").mul_(2))  # type: ignore[no-any-return]

        def call(self, x: Tensor) -> Tensor:
            return self({"x": x.clone()})  # type: ignore[no-any-return]

    module, keep = Writes(), Keep()
    teacher = float_copy(module.net)
    callback = QuantRetrainCallback(input_data=({"x": torch.ones(1, 2, 4, 4)},), distill={"temperature": 3.0})
    make_trainer(callbacks=[callback, keep], log_every_n_steps=1, max_epochs=1).fit(module, loader())
    expected = by_hand(module.given[-1], teacher(2 * module.seen[-1]))
    torch.testing.assert_close(keep.metrics[-1].double(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_forward_may_log_and_ask_for_the_trainer(make_trainer: TrainerFactory) -> None:
    class Asks(Taught):
        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x) * (1 + self.trainer.current_epoch) + torch.zeros(1, device=self.device)
            self.log("mean", out.mean(), batch_size=1, on_step=True)
            return out  # type: ignore[no-any-return]

    class Means(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            found.append(trainer.logged_metrics["mean"])

    module, found = Asks(), list[Tensor]()
    callbacks = [distilling(offload=True), Means()]
    make_trainer(callbacks=callbacks, log_every_n_steps=1, max_epochs=1).fit(module, loader())
    assert [float(mean) for mean in found] == [float(out.mean()) for out in module.given]


class Forgets(Taught):
    """Keeps nothing that has a graph, so that it can be copied."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.given.clear()
        return loss


def test_copies_made_during_the_training_are_modules_of_their_own(make_trainer: TrainerFactory) -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            written = pickle.dumps(pl_module)
            assert b"Teacher" not in written
            for copied in (copy.deepcopy(pl_module), pickle.loads(written)):
                assert all(vars(hook).get("_action") is _nothing for hook in copied.net[0]._forward_hooks.values())
                assert copied.training_step.__self__ is copied
                count = len(pl_module.seen)  # type: ignore[arg-type]
                copied.training_step(next(iter(loader())), 0)
                assert (len(pl_module.seen), len(copied.seen)) == (count, count + 1)  # type: ignore[arg-type]

    make_trainer(callbacks=[distilling(layers=["net.*"]), Copies()], max_epochs=1).fit(Forgets(), loader())


def test_a_module_that_cannot_be_copied_is_told() -> None:
    module = Net()
    module.stream = (line for line in ())  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Net cannot be copied to make the teacher \(TypeError: .*Distill\(module"):
        make_teacher(module, "", None, None, False, None)
    assert isinstance(make_teacher(module, "net", None, None, False, None).part("net"), nn.Sequential)
