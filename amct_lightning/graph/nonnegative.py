"""Which values of the observed data flow are never negative, so that all integers can be for 0 and above.

There is one table: an operator's result is never negative under a condition on its arguments. What is not in the table
may be negative, and so may what comes from outside: inputs and parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from amct_lightning.graph.nodes import RELU, Value

# Condition -> operators of ATen, by name or with their overload. One of the alternatives between the bars has to hold;
# in it, each word is an argument that must not be negative: "x?" may be None as well, "even:x" is an even number
# instead, and "x=y" one value that is given twice.
_TABLE = {
    "": """
        relu sigmoid hardsigmoid _softmax _safe_softmax abs square exp exp2 sqrt rsqrt cosh acos erfc hypot std var norm
        linalg_vector_norm _cdist_forward zero zeros zeros_like new_zeros ones ones_like new_ones eye rand rand_like
        bernoulli exponential
        """,
    "self": """
        view reshape _reshape_alias _unsafe_view flatten unflatten permute transpose t expand squeeze unsqueeze
        slice select narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind unfold
        diagonal diag_embed tril triu
        alias clone detach lift lift_fresh contiguous _to_copy repeat repeat_interleave roll flip rot90 pixel_shuffle
        pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im
        index index_select gather take masked_select topk sort kthvalue median
        max min amax amin aminmax cummax cummin sum nansum mean prod cumsum cumprod
        max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
        adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d avg_pool1d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_bilinear2d_aa
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        leaky_relu rrelu_with_noise _prelu_kernel celu selu gelu silu mish hardswish tanh glu hardshrink softshrink
        sinh asinh atan erf expm1 log1p sign sgn floor ceil round trunc frac
        """,
    "input": "dropout feature_dropout native_dropout",
    "tensors": "cat stack",
    "self other": "div floor_divide fmod minimum fmin min.other where",
    "self other alpha": "add",
    "self other | self=other": "mul",
    "self | other": "maximum fmax max.other",
    "other": "remainder",
    "self mat2": "mm bmm",
    "self vec": "mv",
    "self tensor": "dot",
    "self mat1 mat2 beta alpha": "addmm",
    "self batch1 batch2 beta alpha": "baddbmm",
    "self tensor1 tensor2 value": "addcmul addcdiv",
    "self value": "masked_fill index_fill constant_pad_nd scatter.value",
    "self values": "index_put",
    "self src": "scatter.src scatter_add",
    "self source": "index_copy masked_scatter",
    "self source alpha": "index_add",
    "self scale": "elu",
    "self divisor_override?": "avg_pool2d avg_pool3d",
    "self | even:exponent": "pow",
    "self max? | min max?": "clamp",
    "self max": "clamp_max",
    "self | min": "clamp_min",
    "self max_val | min_val max_val": "hardtanh",
    "self value | threshold value": "threshold",
    "beta threshold": "softplus",
    "from": "uniform",
    "src": "copy",
    "value": "fill",
    "fill_value": "full full_like new_full",
    "s": "scalar_tensor",
}
_OTHER_BITS = "view.dtype"
_CONDITIONS = {operator: condition for condition, operators in _TABLE.items() for operator in operators.split()}
_UNSIGNED = (torch.bool, torch.uint8)


def result_is_never_negative(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], value_of: Callable[[Tensor], Value]
) -> bool:
    """Tell whether the floating tensors that an operator returns have no negative element, whatever the data.

    Args:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        value_of: Gives the value of a tensor.

    Example:
        >>> x, may_be_negative = torch.ones(1), lambda _: Value()
        >>> clamp = torch.ops.aten.clamp.default
        >>> [result_is_never_negative(clamp, (x, low), {}, may_be_negative) for low in (0, -1)]
        [True, False]
    """
    name = _name(func)
    condition = None if name is None else _CONDITIONS.get(f"{name}.{func._overloadname}", _CONDITIONS.get(name))
    if condition is None or f"{name}.{func._overloadname}" == _OTHER_BITS:
        return False
    given = _bound(func, args, kwargs)
    return any(
        all(_holds(word, given, value_of) for word in alternative.split()) for alternative in condition.split("|")
    )


def after_relu(values: Iterable[Value | None]) -> bool:
    """Tell whether a ReLU made all of some values, which is AMCT's rule.

    Args:
        values: The values; ``None`` for one that is not there.

    Example:
        >>> after_relu([Value(torch.ops.aten.relu.default)]), after_relu([Value(torch.ops.aten.sigmoid.default)])
        (True, False)
    """
    return all(value is not None and value.producer in RELU for value in values)


def never_negative(values: Iterable[Value]) -> bool:
    """Tell whether all of some values are known to have no negative element.

    Args:
        values: The values.

    Example:
        >>> never_negative([Value(nonnegative=True), Value()])
        False
    """
    return all(value.nonnegative for value in values)


def _name(func: Any) -> str | None:
    """Return the name of an operator of ATen, that of ``relu`` also for ``relu_``; ``None`` for others.

    What writes into other arguments than the first (``out=``) is among the others.
    """
    if func.namespace != "aten":
        return None
    name = str(func._schema.name).partition("::")[2]
    if not func._schema.is_mutable:
        return name
    return name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else None


def _bound(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator by name, those that were left out included."""
    expected = func._schema.arguments
    named = {argument.name: argument.default_value for argument in expected if argument.has_default_value()}
    return named | {argument.name: value for argument, value in zip(expected, args, strict=False)} | dict(kwargs)


def _holds(word: str, given: Mapping[str, Any], value_of: Callable[[Tensor], Value]) -> bool:
    if word.startswith("even:"):
        exponent = given.get(word.removeprefix("even:"))
        return isinstance(exponent, (int, float)) and exponent % 2 == 0
    if "=" in word:
        first, second = (given.get(name) for name in word.split("="))
        return isinstance(first, Tensor) and isinstance(second, Tensor) and value_of(first) is value_of(second)
    argument = given.get(word.removesuffix("?"))
    return word.endswith("?") if argument is None else _is_nonnegative(argument, value_of)


def _is_nonnegative(argument: Any, value_of: Callable[[Tensor], Value]) -> bool:
    if isinstance(argument, Tensor):
        return argument.dtype in _UNSIGNED or (argument.is_floating_point() and value_of(argument).nonnegative)
    if isinstance(argument, (list, tuple)):
        return all(_is_nonnegative(part, value_of) for part in argument)
    return isinstance(argument, (int, float)) and argument >= 0
