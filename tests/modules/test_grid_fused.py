"""Training on the device's grid as one operation for autograd, against the operations one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amct_lightning import prepare_qat
from amct_lightning.quantizers.executors.build import has_compiler
from tests.modules.cases import COMBINATIONS, LAYERS, LayerCase, Width
from tests.operators import Operators, Reads

CASES = [combination for combination in COMBINATIONS if not combination[0].recurrent]
PLAIN = [case for case in LAYERS if not case.recurrent]
FEW = [
    (case, width)
    for case in LAYERS
    if case.name in ("conv_same", "deconv", "linear", "linear_1d")
    for width in (Width(), Width(4, 4), Width(algo="ulq_retrain"))
]


class Pair:
    """The same layer twice: as one operation, and taken apart because one of its quantizers has a hook."""

    def __init__(self, case: LayerCase, width: Width, execution: str = "composite", calibrate: bool = True) -> None:
        torch.manual_seed(0)
        self.float_model, self.x = case.model(), case.input()
        self.fused, self.apart = (
            prepare_qat(self.float_model, width.config(), self.x, deploy_grid=True, execution=execution).train()
            for _ in range(2)
        )
        self.apart.layer.weight_quantizer.register_forward_hook(lambda *_: None)
        if calibrate:
            for model in (self.fused, self.apart):
                model(self.x)

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.fused, self.apart

    def compare(self, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        """A step of both: outputs and what the layer keeps are equal to the bit, gradients but for orders of sums."""
        outputs, gradients = [], []
        for model in self.models:
            model.zero_grad()
            x = self.x.clone().requires_grad_()
            y = model(x) if run is None else run(model, x)
            torch.manual_seed(1)
            grad = torch.randn(y.shape).to(y.dtype)
            y.backward(grad)
            outputs.append(y.detach())
            gradients.append({"x": x.grad} | {name: p.grad for name, p in model.named_parameters()})
        assert outputs[0].dtype == outputs[1].dtype
        assert torch.equal(*outputs)
        for name, expected in self.apart.state_dict().items():
            assert torch.equal(self.fused.state_dict()[name], expected), name
        for name, expected in gradients[1].items():
            found = gradients[0][name]
            assert found.dtype == expected.dtype
            close = 2 * torch.finfo(found.dtype).eps if found.dtype.itemsize < 4 else 1e-5
            within = close * float(expected.abs().max() + 1e-2)
            torch.testing.assert_close(found, expected, rtol=close, atol=within, msg=f"the gradient of {name} differs")


def is_one_operation(model: nn.Module, x: Tensor) -> bool:
    y = model(x)
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo.extend(parent for parent, _ in node.next_functions if parent is not None)
    return "_QuantizedProductBackward" in names


@pytest.mark.parametrize(("case", "width"), CASES, ids=lambda part: getattr(part, "name", str(part)))
def test_it_is_what_the_operations_one_by_one_are(case: LayerCase, width: Width) -> None:
    pair = Pair(case, width)
    assert [is_one_operation(model, pair.x) for model in pair.models] == [True, False]
    pair.compare()


@pytest.mark.skipif(not has_compiler("cpu"), reason="no C++ compiler")
@pytest.mark.parametrize(("case", "width"), FEW, ids=lambda part: getattr(part, "name", str(part)))
def test_compiled_kernels_give_the_same(case: LayerCase, width: Width) -> None:
    Pair(case, width, "compiled").compare()


@pytest.mark.skipif(not has_compiler("cpu"), reason="no C++ compiler")
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_compiled_kernels_do_not_round_a_gradient_to_the_dtype_of_the_model(algo: str) -> None:
    pair = Pair(next(case for case in LAYERS if case.name == "conv"), Width(algo=algo), "compiled")
    pair.x = pair.x.bfloat16()
    for model in pair.models:
        model.to(torch.bfloat16)
    pair.compare()


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_calibration_is_the_same(case: LayerCase) -> None:
    Pair(case, Width(algo="ulq_retrain"), calibrate=False).compare()


@pytest.mark.parametrize("frozen", ["clips", "scales", "nothing"])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_what_is_frozen_is_the_same(name: str, algo: str, frozen: str) -> None:
    pair = Pair(next(case for case in LAYERS if case.name == name), Width(algo=algo))
    for model in pair.models:
        layer = model.layer
        if frozen == "clips":
            layer.input_quantizer.freeze()
        elif frozen == "scales":
            layer.weight_quantizer.freeze(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(1.5)
            layer.input_quantizer.clip_max.mul_(0.7)
    pair.compare()


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_a_weight_without_gradient_is_the_same(name: str, algo: str) -> None:
    pair = Pair(next(case for case in LAYERS if case.name == name), Width(algo=algo))
    for model in pair.models:
        model.layer.weight.requires_grad_(False)
        model(pair.x).square().sum().backward()
    for (key, found), (_, expected) in zip(*(model.named_parameters() for model in pair.models), strict=True):
        assert (found.grad is None) == (expected.grad is None) == (key == "layer.weight")
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("scale", [1e-9, -0.1])
def test_a_scale_that_the_device_cannot_use_is_1(scale: float, algo: str) -> None:
    """The learned one has the gradient of what it is."""
    pair = Pair(next(case for case in LAYERS if case.name == "conv"), Width(algo=algo))
    for model in pair.models:
        quantizer = model.layer.weight_quantizer
        quantizer.freeze(model.layer.weight)
        with torch.no_grad():
            quantizer.scale[1:3] = scale
    pair.compare()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_autocast_does_not_round_what_is_multiplied(case: LayerCase, dtype: torch.dtype) -> None:
    """Neither forward nor in a backward that is called within it."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            y: Tensor = model(x)
        assert y.dtype == dtype
        return y

    pair, found = Pair(case, Width(algo="ulq_retrain")), []
    pair.compare(run)
    for within in (False, True):
        pair.fused.zero_grad()
        y = run(pair.fused, pair.x)
        with torch.autocast("cpu", dtype=dtype, enabled=within):
            y.backward(torch.ones_like(y))
        found.append([parameter.grad.clone() for parameter in pair.fused.parameters()])
    assert all(torch.equal(*gradients) for gradients in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_model_of_another_dtype_is_the_same(case: LayerCase, dtype: torch.dtype) -> None:
    pair = Pair(case, Width(algo="ulq_retrain"))
    for model in pair.models:
        model.to(dtype)
    pair.x = pair.x.to(dtype)
    pair.compare()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["conv_same", "linear", "deconv"])
def test_activation_checkpointing_gives_the_same(name: str, reentrant: bool) -> None:
    pair = Pair(next(case for case in LAYERS if case.name == name), Width(algo="ulq_retrain"))
    pair.compare(lambda model, x: checkpoint(model, x, use_reentrant=reentrant))  # type: ignore[no-any-return]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_backward_keeps_what_the_float_layer_keeps(case: LayerCase, with_gradient: bool, algo: str) -> None:
    pair = Pair(case, Width(algo=algo))
    x = pair.x.requires_grad_(with_gradient)
    assert kept_bytes(pair.fused, x) == kept_bytes(pair.float_model, x)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_step_reads_nothing_on_the_host(case: LayerCase) -> None:
    pair = Pair(case, Width(algo="ulq_retrain"))
    with Operators() as operators, Reads() as reads:
        pair.fused(pair.x).square().mean().backward()
    assert operators.host_reads == {}
    assert reads.counts == {}


def test_many_terms_are_added_as_one_by_one() -> None:
    """Beyond what float32 adds exactly."""
    pair = Pair(LayerCase("wide", lambda: nn.Linear(3000, 3), (4, 3000)), Width())
    for model in pair.models:
        with torch.no_grad():
            model.layer.weight.abs_()
    pair.compare()


def test_evaluation_is_as_before() -> None:
    pair = Pair(LAYERS[2], Width())
    outputs = [model.eval()(pair.x) for model in pair.models]
    assert torch.equal(*outputs)
    assert not is_one_operation(pair.fused, pair.x)


def test_input_and_weight_may_have_channels_last() -> None:
    pair = Pair(LAYERS[2], Width())
    pair.x = pair.x.to(memory_format=torch.channels_last)
    for model in pair.models:
        model.to(memory_format=torch.channels_last)
    pair.compare()
