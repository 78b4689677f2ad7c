"""The factors of one layer as a plain, immutable value that can check itself.

Only numbers and words are here. The text form is in ``proto_text.py``, the collection of layers in
``quant_record.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from amct_lightning.record import checks
from amct_lightning.record.compare import compare
from amct_lightning.record.numeric import to_float32, to_integer, to_list


@dataclass(frozen=True)
class KVCacheRecord:
    """The factors of a layer's key/value cache. Quantization-aware training keeps but never writes them.

    Example:
        >>> KVCacheRecord(scale=[0.5], offset=[3])
        KVCacheRecord(scale=[0.5], offset=[3])
    """

    scale: list[float]
    offset: list[int]

    def __post_init__(self) -> None:
        """Bring the numbers to the precision of the file."""
        object.__setattr__(self, "scale", to_list("scale", self.scale, to_float32))
        object.__setattr__(self, "offset", to_list("offset", self.offset, to_integer))


@dataclass(frozen=True)
class LayerRecord:
    """The quantization factors of one layer.

    The file holds float32 numbers, so every float is rounded to float32 here; a record read back from its
    own text is therefore equal to it. Making a record checks only that numbers are numbers; :meth:`validate`
    checks the rest.

    Attributes:
        scale_d: Scale of the layer's input, > 0; ``None`` if ``act_type`` says that there is none.
        offset_d: Offset of the layer's input, within the range of ``act_type``; ``None`` without a scale.
        scale_w: Scale of the weight, one per output channel or one for all, > 0.
        offset_w: As many zeros: weights are quantized symmetrically.
        act_type: Type of the quantized input: ``INT4``, ``INT8`` or ``INT16``. Of layers that AMCT does not know:
            ``INT8_PER_TOKEN`` and the like, whose scale is computed for each token when the network runs, and
            ``FLOAT``, if only the weight is quantized.
        wts_type: Type of the quantized weight, from the same three.
        shift_bit: Right shifts of search-N, one per channel or one for all: all 0, or each in 1..16.
        tensor_balance_factor: Written by tensor balancing only.
        skip_fusion: Written by post-training quantization only.
        dst_type: The older form of ``act_type`` and ``wts_type``; kept as it is.
        fakequant_precision_mode: ``DEFAULT`` or ``FORCE_FP16_QUANT``.
        scale_h: Scale of the hidden state of an LSTM or GRU.
        offset_h: Offset of the hidden state, within the range of ``act_type``.
        scale_r: Scale of the recurrent weight, like ``scale_w``.
        offset_r: As many zeros.
        kv_cache: Written by KV-cache quantization only.

    Example:
        >>> layer = LayerRecord(scale_d=0.5, offset_d=-3, scale_w=[0.25, 0.125], offset_w=[0, 0])
        >>> layer.validate("conv1")
        >>> layer.act_type
        'INT8'
    """

    scale_d: float | None
    offset_d: int | None
    scale_w: list[float]
    offset_w: list[int]
    act_type: str = "INT8"
    wts_type: str = "INT8"
    shift_bit: list[int] = field(default_factory=list)
    tensor_balance_factor: list[float] = field(default_factory=list)
    skip_fusion: bool | None = None
    dst_type: str | None = None
    fakequant_precision_mode: str | None = None
    scale_h: float | None = None
    offset_h: int | None = None
    scale_r: list[float] = field(default_factory=list)
    offset_r: list[int] = field(default_factory=list)
    kv_cache: KVCacheRecord | None = None

    def __post_init__(self) -> None:
        """Bring the numbers to the precision of the file, so that equality survives a save and a load."""
        for name in ("scale_w", "tensor_balance_factor", "scale_r"):
            object.__setattr__(self, name, to_list(name, getattr(self, name), to_float32))
        for name in ("offset_w", "shift_bit", "offset_r"):
            object.__setattr__(self, name, to_list(name, getattr(self, name), to_integer))
        if self.scale_d is not None:
            object.__setattr__(self, "scale_d", to_float32("scale_d", self.scale_d))
        if self.offset_d is not None:
            object.__setattr__(self, "offset_d", to_integer("offset_d", self.offset_d))
        if self.scale_h is not None:
            object.__setattr__(self, "scale_h", to_float32("scale_h", self.scale_h))
        if self.offset_h is not None:
            object.__setattr__(self, "offset_h", to_integer("offset_h", self.offset_h))

    @property
    def input_factors(self) -> tuple[float, int]:
        """Scale and offset of the input.

        Raises:
            ValueError: If there are none.

        Example:
            >>> LayerRecord(scale_d=0.5, offset_d=-3, scale_w=[0.25], offset_w=[0]).input_factors
            (0.5, -3)
        """
        if self.scale_d is None or self.offset_d is None:
            raise ValueError(f"There is no scale of the input in this record, whose act_type is {self.act_type}.")
        return self.scale_d, self.offset_d

    def validate(self, layer_name: str) -> None:
        """Check that the factors can be given to the hardware tools.

        Args:
            layer_name: The layer, for the message.

        Raises:
            ValueError: Naming the layer, the field, what was found and what is allowed.

        Example:
            >>> LayerRecord(scale_d=-1.0, offset_d=0, scale_w=[1.0], offset_w=[0]).validate("conv1")
            Traceback (most recent call last):
            ...
            ValueError: layer 'conv1': scale_d is -1.0; a scale must be finite and greater than 0 in float32.
        """
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(f"layer {layer_name!r}: {problem}")

    def differences(self, other: LayerRecord, rtol: float = 1e-4) -> list[str]:
        """List what differs from ``other``; floats may differ by ``rtol`` of the larger one.

        Args:
            other: The record to compare with.
            rtol: Relative tolerance of the floats. Integers and words must be equal.

        Returns:
            One line per differing field; empty if there is none.

        Example:
            >>> layer = LayerRecord(scale_d=0.5, offset_d=0, scale_w=[1.0], offset_w=[0])
            >>> layer.differences(LayerRecord(scale_d=0.5, offset_d=2, scale_w=[1.0], offset_w=[0]))
            ['offset_d: 0 here, 2 there']
        """
        return [str(found) for found in compare({"": self}, {"": other}, rtol)]

    def _problems(self) -> Iterator[str]:
        # The order matters: the types come first because the offsets' ranges are looked up by them.
        types = tuple(checks.OFFSET_RANGES)
        yield from checks.check_word("act_type", self.act_type, (*types, *checks.RANGELESS))
        yield from checks.check_word("wts_type", self.wts_type, types)
        yield from checks.check_input(self.scale_d, self.offset_d, self.act_type)
        yield from checks.check_weight("w", self.scale_w, self.offset_w)
        yield from checks.check_recurrent(self.scale_h, self.offset_h, self.scale_r, self.offset_r, self.act_type)
        yield from self._optional_problems()

    def _optional_problems(self) -> Iterator[str]:
        yield from checks.check_shift(self.shift_bit, len(self.scale_w))
        yield from checks.check_scales("tensor_balance_factor", self.tensor_balance_factor)
        if self.skip_fusion is not None and not isinstance(self.skip_fusion, bool):
            yield f"skip_fusion is {self.skip_fusion!r}; it must be True or False."
        if self.dst_type is not None:
            yield from checks.check_text("dst_type", self.dst_type)
        if self.fakequant_precision_mode is not None:
            yield from checks.check_word(
                "fakequant_precision_mode", self.fakequant_precision_mode, checks.PRECISION_MODES
            )
        if self.kv_cache is not None:
            yield from checks.check_kv_cache(self.kv_cache.scale, self.kv_cache.offset)
