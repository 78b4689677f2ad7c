"""The losses between a student and its teacher, and which tensors of their outputs they compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from amct_lightning.wording import abbreviated

_CLASSES_LAST = 3
"""Up to this number of dimensions, classes are the last one (texts); above it the second one (images)."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of the softened answers of a student from those of its teacher.

    The factor ``temperature**2`` keeps the size of the gradients. Classes are in the last dimension of up to three,
    as in batches of texts, and in the second of more, as in images.

    Args:
        student: Its class scores.
        teacher: Those of the teacher.
        temperature: What the scores are divided by.

    Returns:
        The mean over all positions, at least in float32.

    Example:
        >>> divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), 2.0)
        tensor(0.)
    """
    dim = -1 if student.ndim <= _CLASSES_LAST else 1
    learned = functional.log_softmax(_precise(student) / temperature, dim)
    taught = functional.log_softmax(_precise(teacher) / temperature, dim)
    share = taught.exp()
    terms = torch.where(share > 0, share * (taught - learned), 0.0)  # classes that are masked by -inf: not NaN
    return terms.sum(dim).mean() * temperature**2


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error, at least in float32.

    Args:
        student: What the student gave.
        teacher: What the teacher gave.
    """
    return functional.mse_loss(_precise(student), _precise(teacher))


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tensor_in(output: Any, key: str | None, name: str) -> Tensor:
    """Return the tensor that is compared in the output of a module.

    Args:
        output: The output.
        key: Key or attribute; ``None`` takes ``logits``, or the only tensor of floating-point numbers.
        name: Name of the module, for messages.

    Raises:
        ValueError: If it cannot be told.

    Example:
        >>> tensor_in({"logits": torch.ones(1), "hidden": torch.zeros(1)}, None, "net")
        tensor([1.])
    """
    if isinstance(output, Tensor) and key is None:
        return output
    entry = _entry(output, "logits" if key is None else key)
    found = [entry] if key is not None or isinstance(entry, Tensor) else _floats(output)
    if len(found) == 1 and isinstance(found[0], Tensor):
        return found[0]
    given = abbreviated(output) if isinstance(output, Mapping) else f"a {type(output).__name__}"
    problem = f"has {len(found)} tensors" if key is None else f"has no tensor {key!r}"
    raise ValueError(
        f"Distillation: the output of {name} {problem} (it is {given}), so it cannot be told what to compare. Name its "
        "key or attribute with Distill(output=...), or set output_loss=None and give layers."
    )


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor of floating-point numbers in what a layer gave, such as the sequence of an LSTM.

    Args:
        output: The output.
    """
    return next(iter(_floats(output)), None)


def _entry(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def _floats(output: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
