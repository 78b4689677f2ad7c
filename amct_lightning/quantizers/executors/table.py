"""The factors of all quantizers of a model in one table: what is done with single numbers is done for all at once."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amct_lightning.quantizers.activation import ActivationQuantizer
from amct_lightning.quantizers.functional import activation_scale_offset, repair_clips
from amct_lightning.quantizers.functions.activation import Ends


class Row(NamedTuple):
    """What a quantizer works with in a training forward; 0-d float32 tensors, and what they were made of.

    Attributes:
        upper: Usable upper clip.
        lower: Usable lower clip.
        scale: Scale.
        offset: Offset.
        ends: What the gradients need beside them.
        width: The difference of the clips.
        clips: The clips and those of the step before, as they were.
        versions: Their versions.
    """

    upper: Tensor
    lower: Tensor
    scale: Tensor
    offset: Tensor
    ends: Ends
    width: Tensor
    clips: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def holds(self, quantizer: ActivationQuantizer) -> bool:
        """Tell whether the clips are those that the row was made of."""
        clips = _clips(quantizer)
        same = all(ours is theirs for ours, theirs in zip(self.clips, clips, strict=True))
        return same and self.versions == _versions(clips)


class FactorTable:
    """Computes the factors of all quantizers when the first of them asks, and hands out each row once.

    Writes that no version counter sees, such as those of optimizers that work on one flat memory, come after a backward
    or before a forward. So a row holds for as many calls as a forward makes; asking once more, a backward pass, and
    parameters that were written or replaced make the table anew. Quantizers that are called in another order, or not at
    all, have rows of their own.

    Copies of a model share a new table; what was in it is left out of copies and pickles.

    Example:
        >>> table, quantizer = FactorTable(), ActivationQuantizer(clip=(2.55, -1e-9), fixed_min=True)
        >>> table.take(quantizer).scale
        tensor(0.0100)
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[ActivationQuantizer]] = []
        self._rows: dict[int, Row] = {}
        self._taken: Counter[int] = Counter()
        self._zeros: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def take(self, quantizer: ActivationQuantizer) -> Row:
        """Return the row of a quantizer, which then keeps its clips.

        Args:
            quantizer: A quantizer that is calibrated and not frozen; it enters the table with its first call.
        """
        key = id(quantizer)
        if self._taken[key] >= quantizer.uses:
            self.clear()
        row = self._rows.get(key)
        if row is None or not row.holds(quantizer):
            self._make(quantizer)
            row = self._rows[key]
        self._taken[key] += 1
        quantizer.keep(row.upper, row.lower)
        self._rows[key] = row._replace(versions=_versions(row.clips))  # what was kept is usable, and gives the same row
        return row

    def clear(self) -> None:
        """Let nobody have a row that is there now."""
        self._rows, self._taken = {}, Counter()

    def _make(self, quantizer: ActivationQuantizer) -> None:
        members = [member for member in (reference() for reference in self._members) if member is not None]
        if not any(member is quantizer for member in members):
            members.append(quantizer)
            self._members = [weakref.ref(member) for member in members]
        device, num_bits = quantizer.clip_max.device, quantizer.num_bits
        waiting = [m for m in members if m is quantizer or self._taken[id(m)] < m.uses]
        key = device, num_bits, quantizer.serving
        alike = [m for m in waiting if (m.clip_max.device, m.num_bits, m.serving) == key]
        clips = [_clips(member) for member in alike]
        if device not in self._zeros:
            self._zeros[device] = torch.zeros((), dtype=torch.float32, device=device)
        numbers = [
            self._zeros[device] if index == 1 and member.fixed_min else clip
            for member, four in zip(alike, clips, strict=True)
            for index, clip in enumerate(four)
        ]
        clip_max, clip_min, previous_max, previous_min = torch.stack(numbers).view(-1, 4).unbind(1)
        upper, lower = repair_clips(clip_max, clip_min, previous_max, previous_min, fixed_min=False)
        scale, offset = activation_scale_offset(upper, lower, num_bits, quantizer.serving)
        columns = upper, lower, scale, offset, *Ends.of(upper, lower, scale, offset, num_bits), upper - lower
        cells = torch.stack(columns, 1).view(-1).unbind()
        for index, (member, four) in enumerate(zip(alike, clips, strict=True)):
            high, low, s, o, *ends, width = cells[index * len(columns) : (index + 1) * len(columns)]
            self._rows[id(member)] = Row(high, low, s, o, Ends(*ends), width, four, _versions(four))

    def __deepcopy__(self, memo: dict[int, object]) -> FactorTable:
        copied = memo[id(self)] = FactorTable()
        return copied

    def __reduce__(self) -> tuple[type[FactorTable], tuple[()]]:
        return FactorTable, ()


def has_row(quantizer: ActivationQuantizer) -> bool:
    """Tell whether a quantizer may have a row: not in a graph, nor in ``DataParallel``'s replicas without parameters.

    Args:
        quantizer: The quantizer.
    """
    if torch.compiler.is_compiling() or quantizer.symmetric:
        return False
    return isinstance(quantizer.clip_max, nn.Parameter) and not quantizer.clip_max.is_inference()


def _clips(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return quantizer.clip_max, quantizer.clip_min, quantizer.clip_max_previous, quantizer.clip_min_previous


def _versions(clips: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(clip._version for clip in clips)
