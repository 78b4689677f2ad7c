"""What the hooks of the callbacks cost: in most batches nearly nothing, however many layers there are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from amct_lightning import QuantMonitor, QuantRetrainCallback
from tests.callbacks.conftest import TrainerFactory
from tests.operators import Operators

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
BATCHES, INTERVAL = 12, 5
OF_A_BATCH = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
OF_EVALUATION = ("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end")
# OutsideWrites looks at the factors after each of the first three batches, and at intervals.
STEADY = [batch for batch in range(4, BATCHES) if batch % INTERVAL not in (0, INTERVAL - 1)]

Costs = dict[str, list[Any]]


class Deep(pl.LightningModule):
    """As many linear layers as wanted."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
        self.example_input_array = torch.zeros(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Reads(TorchFunctionMode):
    """Counts values that the host reads; ``tolist`` is no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


@contextmanager
def operators_and_reads(found: list[Any]) -> Iterator[None]:
    with Operators() as operators, Reads() as reads:
        yield
    found.append((dict(operators.counts), reads.count))


@contextmanager
def python_calls(found: list[Any]) -> Iterator[None]:
    names: list[str] = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    yield
    sys.setprofile(None)
    found.append(names)


def costs_of(make_trainer: TrainerFactory, depth: int, measure: Callable[[list[Any]], Any]) -> list[Costs]:
    """Train, and return what the hooks of QuantRetrainCallback and of QuantMonitor have cost in each batch."""
    callbacks: list[pl.Callback] = [QuantRetrainCallback(), QuantMonitor(verbose=False)]
    found: list[Costs] = []

    def measured(hook: Callable[..., None], costs: list[Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with measure(costs):
                hook(*args)

        return call

    for callback in callbacks:
        found.append({name: [] for name in (*OF_A_BATCH, *OF_EVALUATION)})
        for name, costs in found[-1].items():
            setattr(callback, name, measured(getattr(callback, name), costs))
    data = DataLoader(TensorDataset(torch.randn(BATCHES, 4, generator=torch.Generator().manual_seed(0))))
    trainer = make_trainer(callbacks=callbacks, max_epochs=1, log_every_n_steps=INTERVAL, num_sanity_val_steps=0)
    trainer.fit(Deep(depth), data, data)
    return found


def test_in_most_batches_one_operator_is_added_and_at_intervals_one_read(make_trainer: TrainerFactory) -> None:
    quantizing, monitor = costs_of(make_trainer, 3, operators_and_reads)
    for batch in STEADY:
        *others, end = (quantizing[hook][batch][0] for hook in OF_A_BATCH)
        assert others == [{}, {}, {}]
        assert end == {"aten::stack": 1}  # what the flags were
        assert [monitor[hook][batch][0] for hook in OF_A_BATCH] == [{}, {}, {}, {}]
    reads = [
        sum(costs[hook][batch][1] for hook in OF_A_BATCH for costs in (quantizing, monitor)) for batch in range(BATCHES)
    ]
    assert [batch for batch, count in enumerate(reads) if count] == [0, 4, 9]  # the calibration ends with the first
    assert reads[4] == reads[9] == 2  # one of each callback
    assert {hook: costs for hook, costs in quantizing.items() if hook in OF_EVALUATION} == {
        hook: [({}, 0)] for hook in OF_EVALUATION
    }


def test_in_most_batches_the_number_of_layers_does_not_count(make_trainer: TrainerFactory) -> None:
    few, many = (costs_of(make_trainer, depth, python_calls)[0] for depth in (2, 7))
    for hook in OF_A_BATCH:
        assert [few[hook][batch] for batch in STEADY] == [many[hook][batch] for batch in STEADY]
