"""The input that a model is exported with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from amct_lightning.commands.base import UserError
from amct_lightning.commands.model_input import make_input
from amct_lightning.export.tracing.signature import FlatCall
from amct_lightning.graph.forward import InputData
from amct_lightning.graph.preserve import preserved


def example_input(shapes: Sequence[str], model: nn.Module, dynamic_batch: bool = False) -> InputData:
    """Make an input for which a model works.

    Args:
        shapes: See :func:`~amct_lightning.commands.model_input.make_input`.
        model: The model.
        dynamic_batch: Whether its first axes are to be of any length. They are 2 then where they would be 1, because
            torch takes a 1 for a constant.

    Raises:
        UserError: If there is no input, or the model does not run on it.
    """
    input_data = make_input(shapes, model)
    if dynamic_batch:
        input_data = tree_map_only(Tensor, _doubled, input_data)
    try:
        with preserved(model):
            if isinstance(input_data, Mapping):
                model(**input_data)
            else:
                model(*(input_data if isinstance(input_data, tuple) else (input_data,)))
    except Exception as error:  # the model's own, of whatever kind
        why = next((line for line in str(error).splitlines() if line.strip()), "no message")
        what = f"{type(model).__name__} does not take an input of {_described(input_data)}"
        raise UserError(
            f"{what}: {type(error).__name__}: {why}\n"
            "Give the shapes of all arguments of forward with --input-shape, with a batch axis, such as "
            "--input-shape 1,3,32,32."
        ) from error
    return input_data


def batch_axes(model: nn.Module, input_data: InputData) -> dict[str, dict[int, str]]:
    """Return the first axes of an exported model's inputs, as ``dynamic_axes`` names them.

    Args:
        model: The model.
        input_data: Its input.
    """
    call = FlatCall(model, input_data)
    named = zip(call.names, call.tensors, strict=True)
    return {name: {0: "batch"} for name, tensor in named if tensor.dim()}


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _described(input_data: InputData) -> str:
    tensors = [leaf for leaf in tree_leaves(input_data) if isinstance(leaf, Tensor)]
    return ", ".join(f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)
