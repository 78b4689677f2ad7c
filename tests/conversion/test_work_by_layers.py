"""What is done once for a model takes time in proportion to its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amct_lightning import QuantRetrainCallback, prepare_qat
from amct_lightning.conversion.copies import float_copies
from amct_lightning.conversion.report import conversion_report
from tests.work import calls, steps

Network = Callable[[int], tuple[nn.Module, Tensor]]


def linear(depth: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(4, 4), nn.ReLU())]), torch.randn(2, 4)


def convolutional(depth: int) -> tuple[nn.Module, Tensor]:
    layers = [m for _ in range(depth) for m in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(2, 2, 2, 2)


class Shared(nn.Module):
    """Layers in three that read the same tensor; each has two names, and one ReLU is called after all of them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.again = nn.ModuleList(self.layers)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for position in range(0, len(self.layers), 3):
            x = self.relu(sum(layer(x) for layer in self.layers[position : position + 3]))
        return x


class Heads(nn.ModuleList):
    """Layers that all read the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self])


def shared(depth: int) -> tuple[nn.Module, Tensor]:
    return Shared(depth), torch.randn(2, 4)


def heads(depth: int) -> tuple[nn.Module, Tensor]:
    return Heads(nn.Linear(4, 4) for _ in range(depth)), torch.randn(2, 4)


def conversion(model: nn.Module, x: Tensor) -> int:
    return calls(lambda: prepare_qat(model, None, x))


def search_for_copies(model: nn.Module, x: Tensor) -> int:
    whole = nn.ModuleDict(
        {"teacher": nn.Sequential(*[nn.Linear(4, 4) for _ in model]), "net": prepare_qat(model, None, x)}
    )
    return calls(lambda: list(float_copies(whole)))


@pytest.mark.parametrize("network", [linear, convolutional])
@pytest.mark.parametrize("work", [conversion, search_for_copies])
def test_four_times_the_layers_are_about_four_times_the_work(
    work: Callable[[nn.Module, Tensor], int], network: Network
) -> None:
    conversion(*network(2))  # what is imported and kept the first time
    assert work(*network(80)) < 5 * work(*network(20))


class Counted(QuantRetrainCallback):
    """Counts the steps of its setup."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.steps = steps(lambda: super(Counted, self).setup(*args, **kwargs))


class Module(pl.LightningModule):
    """A network, and a loss that is as good as any."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.example_input_array = model, x

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


@pytest.mark.parametrize("network", [linear, convolutional, shared, heads])
def test_no_function_works_more_for_each_layer_because_there_are_more_of_them(network: Network, tmp_path: Path) -> None:
    def setup(depth: int) -> Counter[tuple[str, int, str]]:
        callback, module = Counted(), Module(*network(depth))
        settings = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            max_steps=1, accelerator="cpu", logger=False, callbacks=[callback], default_root_dir=tmp_path, **settings
        )
        trainer.fit(module, DataLoader([module.example_input_array[0]] * 2, 2))
        return callback.steps

    setup(2)
    few, many = setup(12), setup(48)
    assert {where: (few[where], count) for where, count in many.items() if count > 5 * few[where] + 300} == {}


def test_the_report_does_not_name_all_layers_in_the_line_of_each() -> None:
    model, x = heads(40)
    report = str(conversion_report(prepare_qat(model, None, x)))
    line = next(line for line in report.splitlines() if line.startswith("39"))
    assert line.endswith("shares input with 0, 1, 2, 3, 4, 5, 6, 7 and 31 more")


def test_a_copy_among_many_layers_of_one_shape_is_found() -> None:
    model, x = linear(10)
    teacher = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    teacher[3].load_state_dict(model[8].state_dict())
    whole = nn.ModuleDict({"teacher": teacher, "net": prepare_qat(model, None, x)})
    assert [(name, other) for name, _, other, _ in float_copies(whole)] == [("teacher.3", "net.8")]
