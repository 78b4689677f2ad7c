"""The record file as users see it: a mapping from layer names to factors, with load, save and compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from amct_lightning.files import read_bytes, write_text
from amct_lightning.record import proto_text
from amct_lightning.record.checks import check_text
from amct_lightning.record.compare import Difference, compare
from amct_lightning.record.layer_record import LayerRecord

if TYPE_CHECKING:
    from torch import nn


class QuantRecord(Mapping[str, LayerRecord]):
    """The quantization factors of a network, layer by layer, in the order they are written.

    The mapping does not change after it is made. Two records are equal if they have the same layers with
    exactly the same factors, in whatever order; :meth:`allclose` compares with a tolerance.

    Args:
        layers: The factors by layer name.
        extras: Record text of other features (pruning, key/value caches), passed through from load to save.

    Example:
        >>> layer = LayerRecord(scale_d=0.5, offset_d=3, scale_w=[0.25], offset_w=[0])
        >>> record = QuantRecord({"fc": layer})
        >>> record["fc"].offset_d, len(record)
        (3, 1)
        >>> QuantRecord.from_text(record.to_text()) == record
        True
    """

    def __init__(self, layers: Mapping[str, LayerRecord] | None = None, *, extras: str = "") -> None:
        self._layers = dict(layers or {})
        self._extras = extras

    @classmethod
    def from_model(cls, model: nn.Module) -> QuantRecord:
        """Take the factors of a converted model as they are now, without running it.

        Args:
            model: A calibrated QAT model, or a wrapper around one.

        Returns:
            The record, its layers in the order of their first execution.

        Raises:
            ValueError: If the model is not converted, a layer is not calibrated yet, or a factor is not usable
                (NaN, infinite); the message names the layers.

        Example:
            >>> import torch
            >>> from amct_lightning import RetrainConfig, calibrate, prepare_qat
            >>> x = torch.linspace(-1, 1, 8).view(2, 4)
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> model = prepare_qat(model, RetrainConfig.default(model, x), x)
            >>> calibrate(model, [x])
            >>> list(QuantRecord.from_model(model))
            ['0']
        """
        from amct_lightning.record.derive import derive_layers  # noqa: PLC0415  (torch, which a record alone needs not)

        return cls(derive_layers(model))

    @classmethod
    def load(cls, path: str | Path) -> QuantRecord:
        """Read and check a record file, written by this package or by AMCT.

        Args:
            path: The record file. An empty file is a record without layers.

        Returns:
            The record.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the content is not a valid record; the message says where.

        Example:
            >>> import pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "record.txt"
            >>> QuantRecord().save(path)
            >>> len(QuantRecord.load(path))
            0
        """
        content = read_bytes(path)
        if content is None:
            raise FileNotFoundError(
                f"There is no record file '{path}'. It is written during quantization-aware training; "
                f"check the path, or write it with QuantRecord.from_model(model).save('{path}')."
            )
        return cls.from_text(content, source=str(path))

    @classmethod
    def from_text(cls, text: str | bytes, source: str = "record text") -> QuantRecord:
        """Read and check the text of a record file.

        Args:
            text: The content of a record file (bytes are UTF-8); empty is a record without layers.
            source: Where the text comes from, for messages.

        Returns:
            The record.

        Raises:
            ValueError: If the text is not a valid record.

        Example:
            >>> QuantRecord.from_text('record { value { scale_d: 1 } }', source="record.txt")
            Traceback (most recent call last):
            ...
            ValueError: record.txt: record number 1 has no key; every record needs key: "<layer name>".
        """
        try:
            layers, extras = proto_text.read(text)
            record = cls(layers, extras=extras)
            record.validate()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return record

    def to_text(self) -> str:
        """Write the record as text, laid out as AMCT does it.

        Returns:
            The content of a record file.

        Raises:
            ValueError: If the record is not valid.

        Example:
            >>> QuantRecord().to_text()
            ''
        """
        self.validate()
        return proto_text.write(self._layers, self._extras)

    def save(self, path: str | Path) -> None:
        """Check the record and write it to a file, atomically.

        Args:
            path: The file; missing folders are created, an existing file is replaced.

        Raises:
            ValueError: If the record is not valid; an existing file is then left as it is.
            OSError: If the file cannot be written.

        Example:
            >>> import pathlib, tempfile
            >>> QuantRecord().save(pathlib.Path(tempfile.mkdtemp()) / "record.txt")
        """
        write_text(path, self.to_text())

    def validate(self) -> None:
        """Check every layer.

        Raises:
            ValueError: Naming the first layer and field that is wrong, what was found and what is allowed.

        Example:
            >>> bad = LayerRecord(scale_d=0.5, offset_d=200, scale_w=[0.5], offset_w=[0])
            >>> QuantRecord({"fc": bad}).validate()
            Traceback (most recent call last):
            ...
            ValueError: layer 'fc': offset_d is 200; with act_type INT8 it must be in -128..127.
        """
        for name, layer in self._layers.items():
            for problem in check_text("key", name):
                raise ValueError(f"layer {name!r}: {problem}")
            if not name:
                raise ValueError("a layer has an empty name; the key of a record must be the layer's name.")
            layer.validate(name)

    def allclose(self, other: QuantRecord, rtol: float = 1e-4) -> bool:
        """Tell whether both records have the same layers and factors, floats within a relative tolerance.

        Args:
            other: The record to compare with.
            rtol: Tolerance of the scales, relative to the larger one. Offsets and types must be equal.

        Returns:
            True if :meth:`differences` finds none.

        Example:
            >>> QuantRecord().allclose(QuantRecord())
            True
        """
        return not self.differences(other, rtol)

    def differences(self, other: QuantRecord, rtol: float = 1e-4) -> list[str]:
        """List where two records differ.

        Args:
            other: The record to compare with.
            rtol: Tolerance of the scales, relative to the larger one.

        Returns:
            One line per layer that only one side has and per field that differs.

        Example:
            >>> layer = LayerRecord(scale_d=0.5, offset_d=3, scale_w=[0.25], offset_w=[0])
            >>> QuantRecord({"fc": layer}).differences(QuantRecord())
            ['fc: only here']
        """
        return [str(found) for found in self.compare(other, rtol)]

    def compare(self, other: QuantRecord, rtol: float = 0.0, atol: float = 0.0) -> list[Difference]:
        """Find where two records differ, with both values.

        Args:
            other: The record to compare with.
            rtol: Tolerance of the scales, relative to the larger one.
            atol: Absolute tolerance of the scales; they are equal within either.

        Returns:
            One entry per layer that only one side has and per field that differs; the last one may be that of other
            features (pruning, key/value caches).
        """
        found = list(compare(self, other, rtol, atol))
        if self._extras != other._extras:
            found.append(Difference("", "", self._extras, other._extras))
        return found

    def __getitem__(self, name: str) -> LayerRecord:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantRecord):
            return NotImplemented
        return self._layers == other._layers and self._extras == other._extras

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"QuantRecord({len(self)} layers: {', '.join(map(repr, self))})" if self else "QuantRecord(no layers)"
