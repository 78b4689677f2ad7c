"""The states between the steps of the recorded runs, and single steps from them.

AMCT's recordings hold the weights before the first and after the last step only. ``golden/states.safetensors`` holds
them before each step in between. They were written by ``python -m tests.golden_states`` on a CPU with AVX-512, the kind
of machine that the recordings come from; there this package repeats every run to the bit, which is checked while
writing: every output, every loss, every quantizer after every step, and the whole state at the end.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from amct_lightning import RetrainConfig, convert_amct_state_dict, prepare_qat, quantized_layers
from tests.golden_data import GOLDEN, MODEL_CASES, ModelCase, model_case
from tests.golden_exceptions import MODEL_CASES as EXCEPTIONS

STATES = GOLDEN / "states.safetensors"
RECORDINGS = json.loads((GOLDEN / "recordings.json").read_text())
"""Machine -> case -> what AMCT, and the float network, gave there."""
REPEATED = [name for name in MODEL_CASES if name not in EXCEPTIONS]
"""The cases in which this package computes what AMCT does."""
_MOMENTUM = "momentum/"
# Noted by AMCT in each forward; here derived from the clips, which the step has moved since.
_DERIVED = ("acts_scale", "acts_offset", "cur_batch")


@dataclass(frozen=True)
class Step:
    """One training step: the loss before it, the output, the state after it, and how far the state moved."""

    output: Tensor
    loss: float
    after: dict[str, Tensor]
    largest_update: float


class Training:
    """A converted model of a recorded run with its optimizer."""

    def __init__(self, case: ModelCase) -> None:
        self.case = case
        config = RetrainConfig.from_dict(json.loads(case.meta["config_used"]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*INT8 is used instead of INT4.*")
            self.model = prepare_qat(case.float_model(), config, case.group("cal/"), inplace=True).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=case.meta["lr"], momentum=case.meta["momentum"])

    def state(self) -> dict[str, Tensor]:
        """Copies of all tensors of the model, and of the optimizer's momentum."""
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                state[_MOMENTUM + name] = buffer.clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict({key: value for key, value in state.items() if not key.startswith(_MOMENTUM)})
        for name, parameter in self.model.named_parameters():
            if _MOMENTUM + name in state:
                self.optimizer.state[parameter]["momentum_buffer"] = state[_MOMENTUM + name].clone()

    def step(self, number: int) -> Step:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        output = self.model(*self.case.group(f"x/{number}/"))
        loss = self.case.loss(output, number)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        moved = max(float((p.detach() - before[n]).abs().max()) for n, p in self.model.named_parameters())
        return Step(output.detach(), loss.item(), self.state(), moved)

    @property
    def calibration_steps(self) -> int:
        """Steps in which a quantizer calibrates: what it has seen until then is in no recorded state."""
        quantizers = [q for layer in quantized_layers(self.model).values() for q in [layer.input_quantizer]]
        return max(quantizer.batch_num for quantizer in quantizers if quantizer.batch_num)


@cache
def recorded_states(name: str) -> dict[int, dict[str, Tensor]]:
    """Read the states of a case: number of the step -> the state before it."""
    states: dict[int, dict[str, Tensor]] = {}
    with safe_open(STATES, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (it is no mapping)
            case, number, tensor = key.split("/", 2)
            if case == name:
                states.setdefault(int(number), {})[tensor] = file.get_tensor(key)
    return states


def final_state(training: Training) -> dict[str, Tensor]:
    """The state after the last step as AMCT's own recording has it."""
    prefix = "final/"
    recorded = {k.removeprefix(prefix): v for k, v in training.case.tensors.items() if k.startswith(prefix)}
    return convert_amct_state_dict(recorded, training.model)


def recorded_steps(name: str) -> Iterator[tuple[int, Training, dict[str, Tensor]]]:
    """Yield each step of a run: its number, a training in the recorded state before it, the recorded state after it."""
    training, states = Training(model_case(name)), recorded_states(name)
    steps = training.case.meta["steps"]
    for number in range(steps):
        if number in states:
            training.load(states[number])
        yield number, training, states.get(number + 1, final_state(training) if number + 1 == steps else {})


def assert_recorded(training: Training, prefix: str, step: int | None = None) -> None:
    """Compare a model to the bit with what AMCT recorded of it.

    Args:
        training: Has the model.
        prefix: Of the recorded tensors: ``"traj/"``, one entry per step, or ``"final/"``.
        step: After which step.
    """
    own = convert_amct_state_dict(training.model.state_dict(), training.model, to_amct=True)
    for key, value in training.case.tensors.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name in own and not name.endswith(_DERIVED):
            expected = value if step is None else value[step].reshape(own[name].shape)
            assert torch.equal(own[name].nan_to_num(), expected.nan_to_num()), f"{key} after step {step}"


@cache
def recording_of_this_machine() -> str | None:
    """Name the recording that was made on a machine that adds in the same order as this one, if there is one.

    That is asked of networks without any quantizer: their losses in training are in the recordings too, and this
    package has no part in them. Only where all of them agree to the bit the orders can be taken for equal.
    """
    losses = {name: _float_losses(model_case(name)) for name in REPEATED}
    for machine, cases in RECORDINGS.items():
        if all(losses[name] == cases[name]["float_loss"] for name in REPEATED):
            return machine
    return None


def _float_losses(case: ModelCase) -> list[float]:
    return case.train(case.float_model())[0]


def _replay(name: str) -> dict[str, Tensor]:
    """Repeat a run; what is recorded of it must be met to the bit."""
    case = model_case(name)
    training, states = Training(case), {}
    for number in range(case.meta["steps"]):
        if number >= training.calibration_steps:
            states |= {f"{name}/{number}/{key}": value for key, value in training.state().items()}
        step = training.step(number)
        assert torch.equal(step.output, case.tensors[f"out/{number}"]), f"{name}: output of step {number}"
        assert step.loss == case.tensors["loss"][number].item(), f"{name}: loss of step {number}"
        if number + 1 >= training.calibration_steps:
            assert_recorded(training, "traj/", number)
    assert_recorded(training, "final/")
    return states


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file({key: value for name in REPEATED for key, value in _replay(name).items()}, STATES)
    print(f"{STATES}: {STATES.stat().st_size:,} bytes")
