"""Mixed and half precision on NPUs."""

from __future__ import annotations

from functools import wraps
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

NPUPrecisionName = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]


def _as_inside(name: str) -> Any:
    """Make a method of NPUPrecision that does what the plugin inside of it does."""

    @wraps(getattr(Precision, name))
    def method(self: NPUPrecision, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._inner, name)(*args, **kwargs)

    return method


class NPUPrecision(Precision):
    """Precision of the training on an NPU.

    Lightning makes its plugin for mixed precision with the device ``cuda``, which on an NPU has no effect and raises
    no error. The strategies of this package therefore replace what ``Trainer(precision=...)`` chose by this class.

    Quantization factors are computed and kept in float32 with every setting: the quantizers take care of that.

    With ``"16-true"`` the optimizer's numbers are float16 too, and Adam's usual ``eps=1e-8`` is 0 there: the weights
    become NaN in the first step, which a warning announces. Give ``eps=1e-4``.

    With the mixed settings, ``cross_entropy`` computes in the dtype of its input on NPUs: give it ``scores.float()``.

    Args:
        precision: ``"bf16-mixed"`` or ``"16-mixed"`` cast inside of ``torch.autocast("npu")``, the latter with loss
            scaling; ``"bf16-true"`` or ``"16-true"`` convert the model; ``"32-true"`` changes nothing.
        scaler: A ``torch.amp.GradScaler("npu", ...)`` with settings of your own, for ``"16-mixed"``.

    Raises:
        MisconfigurationException: If the name is not one of these, or a scaler is given that has no use.

    Example:
        >>> NPUPrecision("bf16-mixed").precision
        'bf16-mixed'
    """

    def __init__(self, precision: NPUPrecisionName = "32-true", scaler: torch.amp.GradScaler | None = None) -> None:
        if precision not in get_args(NPUPrecisionName):
            raise MisconfigurationException(
                f"precision={precision!r} is not possible on an NPU. Allowed are: "
                f"{', '.join(get_args(NPUPrecisionName))}."
            )
        if scaler is not None and precision != "16-mixed":
            raise MisconfigurationException(f"precision='{precision}' uses no scaler; leave out scaler={scaler!r}.")
        self.precision = precision
        self._inner = _inner_plugin(precision, scaler)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the loss, with ``"16-mixed"``."""
        return getattr(self._inner, "scaler", None)

    @property
    def device(self) -> str:
        """The device type of the autocast."""
        return "npu"

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Warn about optimizers that would divide by zero, with ``"16-true"``."""
        if self.precision == "16-true":
            for optimizer in optimizers:
                _warn_vanishing_epsilon(optimizer)
        return super().connect(model, optimizers, lr_schedulers)

    convert_module = _as_inside("convert_module")
    convert_input = _as_inside("convert_input")
    convert_output = _as_inside("convert_output")
    tensor_init_context = _as_inside("tensor_init_context")
    module_init_context = _as_inside("module_init_context")
    forward_context = _as_inside("forward_context")
    pre_backward = _as_inside("pre_backward")
    optimizer_step = _as_inside("optimizer_step")
    clip_gradients = _as_inside("clip_gradients")
    state_dict = _as_inside("state_dict")
    load_state_dict = _as_inside("load_state_dict")


def npu_precision(plugin: Precision | None) -> Precision | None:
    """Replace a precision plugin of Lightning by its twin for NPUs.

    Args:
        plugin: What ``Trainer(precision=...)`` or the user chose.

    Returns:
        The twin; a plugin that is right for NPUs already, or unknown, as it is.

    Raises:
        MisconfigurationException: If an NPU cannot do it: float64, or a plugin bound to CUDA.

    Example:
        >>> type(npu_precision(MixedPrecision("bf16-mixed", "cuda"))).__name__
        'NPUPrecision'
    """
    if isinstance(plugin, DoublePrecision):
        refuse_double()
    if type(plugin) is HalfPrecision or (type(plugin) is MixedPrecision and plugin.device != "npu"):
        return NPUPrecision(cast(NPUPrecisionName, plugin.precision))
    if type(plugin) is Precision or plugin is None or isinstance(plugin, (NPUPrecision, MixedPrecision)):
        return plugin
    if type(plugin).__module__.startswith("lightning."):
        raise MisconfigurationException(
            f"{type(plugin).__name__} is made for other devices. Choose precision= one of: "
            f"{', '.join(get_args(NPUPrecisionName))}."
        )
    return plugin


def refuse_double() -> NoReturn:
    """Refuse ``precision="64-true"``.

    Raises:
        MisconfigurationException: Always.
    """
    raise MisconfigurationException(
        "precision='64-true' is not possible on NPUs: HCCL's collectives refuse float64, and most kernels of the "
        "device do not know it. Use precision='32-true', or accelerator='cpu'."
    )


def _inner_plugin(precision: NPUPrecisionName, scaler: torch.amp.GradScaler | None) -> Precision:
    if precision == "bf16-mixed":
        return MixedPrecision(precision, "npu")
    if precision == "16-mixed":
        return MixedPrecision(precision, "npu", scaler or torch.amp.GradScaler("npu"))
    if precision in ("bf16-true", "16-true"):
        return HalfPrecision(precision)
    return Precision()


def _warn_vanishing_epsilon(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        epsilon = group.get("eps")
        half = any(parameter.dtype == torch.float16 for parameter in group["params"])
        if half and isinstance(epsilon, float) and torch.tensor(epsilon, dtype=torch.float16) == 0:
            rank_zero_warn(
                f"{type(optimizer).__name__}(eps={epsilon}) with precision='16-true': this eps is 0 in float16, so the "
                f"first step divides by zero and weights become NaN, with quantization or without. Give eps=1e-4, "
                f"or use precision='bf16-true' or '16-mixed'."
            )
            return
