"""Hooks that hear what a student is asked in a training step, ask its teacher the same, and keep both answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Ask = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
"""Answers for the part of a name to positional and keyword arguments."""


@dataclass
class Call:
    """One call of a student and what came of it.

    Attributes:
        name: Name of the module that was called.
        taught: What the teacher gave.
        learned: What the student gave.
        taught_layers: What the chosen layers of the teacher gave, in the order of their calls, by name.
        learned_layers: The same of the student.
    """

    name: str
    taught: Any
    learned: Any = None
    taught_layers: dict[str, list[Any]] = field(default_factory=dict)
    learned_layers: dict[str, list[Any]] = field(default_factory=dict)


class Listener:
    """Hears the calls of a student during its training steps, and no others.

    A forward that is repeated in the backward pass, as activation checkpointing does, comes after the step. Nothing is
    computed with the answers here: inside a checkpointed part, that would have to be repeated as well.

    Args:
        ask: Asks the teacher.

    Attributes:
        calls: The complete calls of the step.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._is_listening = False
        self._open: Call | None = None
        self._depth = 0
        self._teacher_layers: dict[str, list[Any]] = {}
        self._handles: list[Any] = []
        self.calls: list[Call] = []

    def attach(
        self, students: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], taught: Mapping[str, nn.Module]
    ) -> None:
        """Put the hooks on.

        Args:
            students: The modules whose calls are taught, by name. A call inside of another one does not count.
            layers: The layers of the student that are compared, by name.
            taught: The same layers of the teacher.
        """
        for name, layer in taught.items():
            self._handles.append(layer.register_forward_hook(_Hook(self._hear_teacher, name)))
        for name, layer in layers.items():  # before the end of a call is heard, should one be called itself
            self._handles.append(layer.register_forward_hook(_Hook(self._hear_layer, name)))
        for name, student in students.items():
            # In front of the others, which may change the arguments: the teacher has hooks like them.
            asking = _Hook(self._begin, name)
            self._handles.append(student.register_forward_pre_hook(asking, prepend=True, with_kwargs=True))
            self._handles.append(student.register_forward_hook(_Hook(self._end, name)))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def listening(self) -> Iterator[list[Call]]:
        """Listen during a training step, and give the calls of it."""
        self._is_listening, self._open, self._depth, self.calls = True, None, 0, []
        try:
            yield self.calls
        finally:
            self._is_listening, self._open, self.calls, self._teacher_layers = False, None, [], {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_listening or not torch.is_grad_enabled():
            return
        if self._open is not None:
            self._depth += self._open.name == name
            return
        self._teacher_layers = {}
        taught = self._ask(name, args, kwargs)
        self._open, self._depth = Call(name, taught, taught_layers=self._teacher_layers), 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._open is None or self._open.name != name:
            return
        if self._depth:  # a module that calls itself
            self._depth -= 1
            return
        self._open.learned = output
        self.calls.append(self._open)
        self._open = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _hear_layer(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._open is not None:
            self._open.learned_layers.setdefault(name, []).append(output)

    def _hear_teacher(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self._teacher_layers.setdefault(name, []).append(output)


class _Hook:
    """A hook that knows a name. In copies of the module, and where it is loaded again, it does nothing."""

    def __init__(self, action: Callable[..., None], name: str) -> None:
        self._action = action
        self._name = name

    def __call__(self, *args: Any) -> None:
        self._action(self._name, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing, self._name)


def _nothing(*_args: Any) -> None:
    """Stay silent in copies."""
