"""What one observed forward tells about a model: producers, readers, sharing, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning import RetrainConfig
from amct_lightning.config import DataConfig, LayerConfig
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import LayerPlan, QuantPlan


class Net(nn.Module):
    """Two convolutions with any code in between."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.Conv2d(2, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def image() -> Tensor:
    return torch.randn(2, 2, 6, 6)


def plan_of(model: nn.Module, input_data: object = None, config: RetrainConfig | None = None) -> QuantPlan:
    return make_plan(model, config, image() if input_data is None else input_data)


def layers(model: nn.Module, input_data: object = None) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan_of(model, input_data).layers}


class Mlp(nn.Module):
    """Two linear layers with any code in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("between", "fixed"),
    [
        (nn.Flatten(), False),
        (lambda x: torch.flatten(x, 1), False),
        (lambda x: x.float(), False),
        (lambda x: x.to(torch.float32), False),
        (lambda x: x.to(dtype=torch.float32), False),
        (lambda x: x.cpu(), False),
        (lambda x: x.to("cpu", torch.float32), False),
        (nn.Identity(), True),
        (nn.Dropout(), True),
        (lambda x: x.contiguous(), True),
        (lambda x: x.clone(), True),
        (lambda x: x.detach(), True),
    ],
)
def test_nodes_of_the_exported_graph_count_also_where_they_return_their_input(
    between: Callable[[Tensor], Tensor], fixed: bool
) -> None:
    assert layers(Mlp(between), torch.randn(2, 4))["b"].fixed_min is fixed


def test_readers_of_two_nodes_do_not_share() -> None:
    class Net2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.flatten(x, 1)) + self.b(torch.flatten(x, 1))

    assert layers(Net2(), torch.randn(2, 4))["b"].shares_input_of == "b"


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        lambda x: x.relu_(),
        lambda x: F.relu(x + x),
        lambda x: F.relu(x, inplace=True),
    ],
    ids=["module", "inplace_module", "functional", "torch", "method_inplace", "of_a_sum", "functional_inplace"],
)
def test_an_input_that_a_relu_made_has_fixed_min(between: Callable[[Tensor], Tensor]) -> None:
    found = layers(Net(between))
    assert (found["a"].fixed_min, found["b"].fixed_min) == (False, True)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x,
        nn.ReLU6(),
        torch.sigmoid,
        lambda x: F.max_pool2d(F.relu(x), 2),
        lambda x: F.avg_pool2d(F.relu(x), 2),
        lambda x: F.relu(x).reshape(2, 2, 6, 6) + 0,
        lambda x: torch.cat([F.relu(x), x], dim=0),
        lambda x: F.relu(x) + x,
        lambda x: F.relu(x).add_(1),
    ],
    ids=["conv", "relu6", "sigmoid", "max_pool", "avg_pool", "reshape", "cat", "sum_of_relu", "inplace_add"],
)
def test_anything_between_relu_and_layer_means_no_fixed_min(between: Callable[[Tensor], Tensor]) -> None:
    assert not layers(Net(between))["b"].fixed_min


@pytest.mark.parametrize("given", [True, False])
def test_the_config_s_fixed_min_wins(given: bool) -> None:
    data = DataConfig(fixed_min=given)
    config = RetrainConfig(layers={name: LayerConfig(retrain_data_config=data) for name in ("a", "b")})
    plan = plan_of(Net(F.relu), config=config)
    assert [layer.fixed_min for layer in plan.layers] == [given, given]


def test_layers_are_planned_in_order_of_first_execution() -> None:
    class Backwards(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x))

    plan = plan_of(Backwards())
    assert [layer.name for layer in plan.layers] == ["b", "a"]
    assert list(plan.config) == ["a", "b"]


class Readers(nn.Module):
    """Two layers that read tensors made from one input."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.Conv2d(2, 2, 1)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.first(x)) + self.b(self.second(x))


def test_layers_that_read_the_same_value_share() -> None:
    assert layers(Readers(lambda x: x, lambda x: x))["b"].shares_input_of == "a"


def test_a_tensor_changed_in_place_is_another_value() -> None:
    assert layers(Readers(lambda x: x, lambda x: x.mul_(2)))["b"].shares_input_of == "b"


def test_branches_that_are_concatenated_share_their_common_input() -> None:
    class Cat(Readers):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x)
            return torch.cat([self.a(x), self.b(x)], dim=1)

    found = layers(Cat(lambda x: x, lambda x: x))
    assert found["b"].shares_input_of == "a"
    assert found["a"].fixed_min


class TwoInputs(nn.Module):
    """Takes its inputs by keyword, one of them in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(5, 4)

    def forward(self, left: Tensor, others: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        y = self.a(left)
        return {"out": y if others is None else y + self.b(others["right"])}


def test_keyword_and_dict_inputs() -> None:
    inputs = {"left": torch.randn(2, 3), "others": {"right": torch.randn(2, 5)}}
    assert list(layers(TwoInputs(), inputs)) == ["a", "b"]


def test_positional_inputs_in_a_tuple() -> None:
    assert list(layers(TwoInputs(), (torch.randn(2, 3), {"right": torch.randn(2, 5)}))) == ["a", "b"]


def test_a_layer_that_is_not_called_is_not_planned() -> None:
    assert list(layers(TwoInputs(), {"left": torch.randn(2, 3)})) == ["a"]


def test_a_layer_that_is_called_twice_is_not_planned() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.b(x)))

    assert list(layers(Twice())) == ["a"]


def test_a_layer_called_by_keyword_is_planned() -> None:
    class Keyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=F.relu(self.a(input=x)))

    assert layers(Keyword())["b"].fixed_min


def test_nested_modules_have_dotted_names() -> None:
    assert list(layers(nn.Sequential(nn.Sequential(Net()), nn.Conv2d(2, 2, 1)))) == ["0.0.a", "0.0.b", "1"]


def test_one_module_under_two_names_is_called_twice() -> None:
    shared = nn.Conv2d(2, 2, 1)
    assert list(layers(nn.Sequential(shared, nn.Conv2d(2, 2, 1), shared))) == ["1"]


def test_tied_weights_drop_both_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    model[2].weight = model[0].weight
    assert list(layers(model)) == ["1"]


def test_python_control_flow_is_followed() -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    assert list(layers(Branch(), torch.ones(1, 2, 4, 4))) == ["a"]
    assert list(layers(Branch(), -torch.ones(1, 2, 4, 4))) == ["b"]


class WithBatchNorm(nn.Module):
    """A convolution, a BatchNorm that reads it, and anything else."""

    def __init__(self, layer: nn.Module | None = None, bn: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = layer or nn.Conv2d(2, 2, 1)
        self.bn = bn or nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def test_a_batch_norm_that_is_the_only_reader_is_folded() -> None:
    assert layers(WithBatchNorm())["conv"].batch_norm == "bn"


def test_a_batch_norm_is_not_folded_if_something_else_reads_the_convolution() -> None:
    class Extra(WithBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    assert layers(Extra())["conv"].batch_norm is None


def test_a_batch_norm_is_not_folded_if_the_convolution_is_also_an_output() -> None:
    class Output(WithBatchNorm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.bn(y), y

    assert layers(Output())["conv"].batch_norm is None


def test_a_batch_norm_behind_another_operation_is_not_folded() -> None:
    class Between(WithBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.relu(self.conv(x)))

    assert layers(Between())["conv"].batch_norm is None


def test_a_batch_norm_that_serves_two_convolutions_is_not_folded() -> None:
    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.b(self.bn(self.a(x))))

    assert {layer.batch_norm for layer in layers(Both()).values()} == {None}


def test_a_batch_norm_without_running_statistics_is_not_folded() -> None:
    model = WithBatchNorm(bn=nn.BatchNorm2d(2, track_running_stats=False))
    assert layers(model)["conv"].batch_norm is None


def test_a_batch_norm_behind_a_linear_layer_is_not_folded() -> None:
    model = WithBatchNorm(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert layers(model, torch.randn(3, 4))["conv"].batch_norm is None


def test_a_batch_norm_behind_a_transposed_convolution_is_not_folded() -> None:
    assert layers(WithBatchNorm(nn.ConvTranspose2d(2, 2, 2)))["conv"].batch_norm is None


def test_a_plan_survives_its_plain_form() -> None:
    plan = plan_of(WithBatchNorm())
    assert QuantPlan.from_dict(plan.to_dict()) == plan


def test_a_damaged_plan_is_refused_with_its_source() -> None:
    data = plan_of(WithBatchNorm()).to_dict()
    del data["layers"][0]["fixed_min"]
    with pytest.raises(ValueError, match=r"plan in last\.ckpt is damaged .*fixed_min"):
        QuantPlan.from_dict(data, source="last.ckpt")
