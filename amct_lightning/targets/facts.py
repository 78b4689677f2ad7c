"""The one table of facts about what a network is meant for: the Ascend generations, and servers of language models.

Nothing here was run on hardware. Each fact says where it comes from: [read] is source code, [doc] is documentation.
What neither tells is doubtful, and says that it was not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from amct_lightning.targets.kinds import Atc, Fact, Target, TargetName
from amct_lightning.targets.serving import SERVING

_INT8 = Fact(
    "runs",
    "the matrix unit computes with it",
    "[doc] AMCT, create_quant_retrain_model: INT8 for all products (CANN 8.1 to 9.1)",
)
_INT16 = Fact(
    "doubtful",
    "AMCT's documentation lists INT8 only, and what the compiler does with INT16 was not checked",
    "[doc] AMCT, create_quant_retrain_model (CANN 9.1), layers of quantization-aware training (CANN 9.2)",
)
_INT4_ON_A2_A3 = Fact(
    "doubtful",
    "the matrix unit computes with INT4, but AMCT's documentation says that its deployed models gain no speed from it",
    "[doc] torch_npu, npu_quant_matmul; AMCT, create_quant_retrain_model: no gain (CANN 8.1 to 9.0), INT8 only (9.1)",
)
_INT4_ON_950 = Fact(
    "unsupported",
    "the matrix unit has no INT4: the vector unit unpacks it to INT8, so that it costs accuracy and gains no speed",
    "[read] asc-devkit, matmul_s4; [doc] AMCT, create_quant_retrain_model: INT8 only (CANN 9.1)",
)
_INT4_ON_310P = Fact(
    "doubtful",
    "AMCT's documentation lists INT4 for it up to CANN 9.0.0-beta1, and INT8 only from CANN 9.1 on",
    "[doc] AMCT, create_quant_retrain_model (CANN 8.1 to 9.1)",
)
_GROUPED = Fact(
    "doubtful",
    "npu_quant_conv2d of torch_npu takes groups=1 only, and how fast the compiler's depthwise and grouped "
    "convolutions are was not checked",
    "[doc] op-plugin, npu_quant_conv2d",
)
_PER_TOKEN = Fact(
    "doubtful",
    "AMCT's documentation knows activations with a fixed scale only",
    "[doc] AMCT, create_quant_retrain_model (CANN 9.1)",
)
_WEIGHT_ONLY = Fact(
    "doubtful",
    "AMCT's documentation has no weights that are quantized alone in quantization-aware training",
    "[doc] AMCT, create_quant_retrain_model (CANN 9.1)",
)
_LINEAR_BY_CHANNEL = Fact(
    "unsupported",
    "ATC takes one weight scale for the MatMul or Gemm that a Linear becomes",
    "[doc] AMCT, conversion of quantized ONNX models (CANN 9.1); its channel_wise is for convolutions only",
)


def _listed(source: str) -> Fact:
    return Fact("runs", "AMCT's documentation lists it", f"[doc] AMCT, {source}")


def _refused(kind: str, source: str) -> Fact:
    why = f"AMCT's documentation says that no product of this generation supports a quantized {kind}"
    return Fact("unsupported", why, f"[doc] AMCT, {source}")


_LAYERS: Mapping[str, Fact] = MappingProxyType(
    {
        "Linear": _listed("layers of quantization-aware training (CANN 9.1)"),
        "Conv2d": _listed("layers of quantization-aware training (CANN 9.1)"),
        "ConvTranspose2d": _listed("layers of quantization-aware training (CANN 9.1)"),
        "Conv3d": _listed("Conv3dQAT (CANN 8.3 to 9.1)"),
        "Conv1d": _refused("Conv1d", "Conv1dQAT (CANN 9.1)"),
        "ConvTranspose1d": _refused("ConvTranspose1d", "ConvTranspose1dQAT (CANN 9.2)"),
        "GRU": _refused("GRU", "GRUQAT (CANN 9.1)"),
        "LSTM": Fact("doubtful", "whether the compiler quantizes it was not checked", "none"),
        "ConvTranspose3d": Fact(
            "doubtful", "AMCT does not know it, and whether the compiler quantizes it was not checked", "none"
        ),
    }
)


def _pairs(int4: Fact) -> Mapping[tuple[str, str], Fact]:
    return MappingProxyType(
        {("INT8", "INT8"): _INT8, ("INT16", "INT8"): _INT16, ("INT8", "INT4"): int4, ("INT4", "INT4"): int4}
    )


def _generation(name: TargetName, products: str, int4: Fact, atc: Atc) -> Target:
    return Target(
        name=name,
        products=products,
        pairs=_pairs(int4),
        layers=_LAYERS,
        grouped=_GROUPED,
        linear_by_channel=_LINEAR_BY_CHANNEL,
        per_token=_PER_TOKEN,
        weight_only=MappingProxyType({"INT8": _WEIGHT_ONLY, "INT4": _WEIGHT_ONLY}),
        atc=atc,
    )


_NAME = "'Ascend' and the Name that `npu-smi info` shows"
_CHIP = "the Chip Name, '_' and the NPU Name that `npu-smi info -t board -i ID{chip}` shows"
_OF_A2 = Atc(
    soc_prefix="Ascend910B",
    soc_examples=("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4"),
    soc_version=None,
    soc_query=_NAME,
)
_OF_A3 = Atc(
    soc_prefix="Ascend910_93",
    soc_examples=("Ascend910_9362", "Ascend910_9382", "Ascend910_9391", "Ascend910_9392"),
    soc_version=None,
    soc_query=_CHIP.format(chip=" -c CHIP"),
)
_OF_950 = Atc(
    soc_prefix="Ascend950",
    soc_examples=("Ascend950PR_9579", "Ascend950PR_9589", "Ascend950PR_9599"),
    soc_version=None,
    soc_query=_CHIP.format(chip=""),
)
_OF_310P = Atc(soc_prefix="Ascend310P", soc_examples=("Ascend310P3",), soc_version="Ascend310P3", soc_query=_NAME)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            _generation("A2", "Atlas A2", _INT4_ON_A2_A3, _OF_A2),
            _generation("A3", "Atlas A3", _INT4_ON_A2_A3, _OF_A3),
            _generation("950", "Ascend 950PR/950DT", _INT4_ON_950, _OF_950),
            _generation("310P", "Atlas inference cards with Ascend 310P", _INT4_ON_310P, _OF_310P),
            *SERVING,
        )
    }
)
"""Name -> :class:`Target`. The values of ``--soc_version`` are those of CANN 9.0 and 9.1."""


ATC_TARGETS: Mapping[str, Atc] = MappingProxyType(
    {name: target.atc for name, target in TARGETS.items() if target.atc is not None}
)
"""What ATC calls the generations that it compiles for."""


def find_target(name: object, where: str = "target") -> Target:
    """Return what is known of a generation or of servers.

    Args:
        name: Its name; small or capital letters and the number 950 are fine.
        where: What the name is called in the message.

    Raises:
        ValueError: If there is none of this name.

    Example:
        >>> find_target("950").pairs["INT8", "INT4"].verdict
        'unsupported'
        >>> find_target("a2").name, find_target("Serving").serves_in
        ('A2', ('bfloat16', 'float16'))
    """
    found = _BY_NAME.get(str(name).lower())
    if found is None:
        known = ", ".join(f"'{target.name}' ({target.products})" for target in TARGETS.values())
        raise ValueError(f"{where}={name!r}: there is no such target. Give one of {known}, or None for any.")
    return found


_BY_NAME = {name.lower(): target for name, target in TARGETS.items()}
