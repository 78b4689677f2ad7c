"""Seeing the data flow changes nothing in the user's module, and logs nothing."""

from __future__ import annotations

import random
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from amct_lightning import QuantRetrainCallback, prepare_qat, quantized_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader


class StoppedError(Exception):
    pass


class Bookkeeper(Net):
    """Keeps all kinds of state in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.calls = 0
        self.seen: list[tuple[int, ...]] = []
        self.by_mode = {"train": 0, "eval": 0}
        self.register_buffer("mean", torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
            self.mean.copy_(x.mean())
            self.gain.data.fill_(float(x.std()))
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.by_mode["train" if self.training else "eval"] += 1
        self.log("calls", float(self.calls), batch_size=1)
        noise = torch.rand(()) * random.random()
        return self.net(self.norm(x - self.mean) * self.gain + 0 * noise)


@pytest.fixture
def observed(make_trainer: TrainerFactory) -> Bookkeeper:
    """A module after its conversion, before anything else."""
    model = Bookkeeper()
    random.seed(1)
    with pytest.raises(StoppedError):
        make_trainer(callbacks=[QuantRetrainCallback(), Stop()]).fit(model, loader())
    assert quantized_layers(model)
    return model


class Stop(Callback):
    def setup(self, *_: Any, **__: Any) -> None:
        raise StoppedError


def test_plain_attributes(observed: Bookkeeper) -> None:
    fresh = Bookkeeper()
    assert (observed.ready, observed.calls, observed.seen) == (False, 0, [])
    assert observed.by_mode == fresh.by_mode


def test_parameters_buffers_and_statistics(observed: Bookkeeper) -> None:
    for name, tensor in Bookkeeper().state_dict().items():
        assert torch.equal(observed.state_dict()[name], tensor), name


def test_logging_and_the_methods_for_it(observed: Bookkeeper) -> None:
    assert not {"log", "log_dict"} & vars(observed).keys()


def test_random_state(make_trainer: TrainerFactory) -> None:
    def numbers(callbacks: list[Any]) -> tuple[float, float]:
        torch.manual_seed(3)
        random.seed(3)
        with pytest.raises(StoppedError):
            make_trainer(callbacks=[*callbacks, Stop()]).fit(model, loader())
        return random.random(), float(torch.rand(()))

    model = Bookkeeper()
    assert numbers([QuantRetrainCallback()]) == numbers([])


def test_a_module_that_starts_from_its_first_data_starts_from_that_of_training(make_trainer: TrainerFactory) -> None:
    model, twin = Bookkeeper(), Bookkeeper()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    make_trainer().fit(twin, loader())
    assert float(twin.mean) == float(model.mean) != 0
    assert model.calls == twin.calls


def test_nothing_is_logged_for_it(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    class Logs(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self._trainer is not None and self.logger is not None:
                self.logger.log_metrics({"forwards": 1.0}, step=0)
            return self.net(x)

    logger = CSVLogger(tmp_path)
    with pytest.raises(StoppedError):
        make_trainer(callbacks=[QuantRetrainCallback(), Stop()], logger=logger).fit(Logs(), loader())
    assert logger.experiment.metrics == []


def test_a_module_that_cannot_be_copied_runs_itself_and_it_is_said(make_trainer: TrainerFactory) -> None:
    class Locked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return self.net(x)

    model = Locked()
    with pytest.warns(UserWarning, match="Locked cannot be copied .*Plain attributes that its forward sets stay set"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert len(quantized_layers(model)) == 2


def test_prepare_qat_leaves_the_attributes_alone_as_well() -> None:
    class Flag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(4, 2), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            return self.fc(x)

    model = Flag()
    prepare_qat(model, None, torch.randn(2, 4))
    assert model.calls == [0]


def test_data_that_the_module_holds_is_not_copied(make_trainer: TrainerFactory) -> None:
    class Uncopied(torch.utils.data.TensorDataset):
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise MemoryError("as large as data is")

    class Holds(Net):
        def __init__(self) -> None:
            super().__init__()
            data = Uncopied(torch.zeros(1))
            self.data, self.parts = data, {"train": [data], "val": (data,)}

    model = Holds()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be copied")
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.0", "net.4"]
