"""The protobuf schema (proto2) of the ``.cfg`` simple configuration.

How a schema becomes classes is in ``proto_schema.py``; what a text means in ``simple_format.py``. The messages of
pruning are here so that a text with them can be read and refused for what it asks, not as a spelling mistake.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from amct_lightning.proto_schema import Field, Schema

_OVERRIDE: Final = (
    Field("optional", "RetrainDataQuantConfig", "retrain_data_quant_config", 2),
    Field("optional", "RetrainWeightQuantConfig", "retrain_weight_quant_config", 3),
    Field("optional", "PruneConfig", "prune_config", 4),
)
_WEIGHT_SETTINGS: Final = (
    Field("optional", "DataType", "dst_type", 1, "INT8"),
    Field("optional", "bool", "channel_wise", 2),
)

_MESSAGES: Final = MappingProxyType(
    {
        "AMCTRetrainConfig": (
            Field("optional", "uint32", "batch_num", 1, "1"),
            Field("optional", "RetrainDataQuantConfig", "retrain_data_quant_config", 2),
            Field("optional", "RetrainWeightQuantConfig", "retrain_weight_quant_config", 3),
            Field("repeated", "string", "skip_layers", 4),
            Field("repeated", "RetrainOverrideLayer", "override_layer_configs", 5),
            Field("repeated", "string", "skip_layer_types", 6),
            Field("repeated", "RetrainOverrideLayerType", "override_layer_types", 7),
            Field("optional", "PruneConfig", "prune_config", 8),
            Field("repeated", "string", "regular_prune_skip_layers", 9),
            Field("repeated", "string", "regular_prune_skip_types", 10),
            Field("repeated", "string", "quant_skip_layers", 11),
            Field("repeated", "string", "quant_skip_types", 12),
            Field("optional", "AMCTRetrainConfig.FakequantPrecisionMode", "fakequant_precision_mode", 21),
        ),
        "RetrainOverrideLayer": (Field("required", "string", "layer_name", 1), *_OVERRIDE),
        "RetrainOverrideLayerType": (Field("required", "string", "layer_type", 1), *_OVERRIDE),
        "RetrainDataQuantConfig": (Field("optional", "ActULQquantize", "ulq_quantize", 13, oneof="algo"),),
        "ActULQquantize": (
            Field("optional", "ClipMaxMin", "clip_max_min", 1),
            Field("optional", "bool", "fixed_min", 2),
            Field("optional", "DataType", "dst_type", 3, "INT8"),
        ),
        "ClipMaxMin": (
            Field("required", "float", "clip_max", 3),
            Field("required", "float", "clip_min", 5),
        ),
        "RetrainWeightQuantConfig": (
            Field("optional", "ARQRetrain", "arq_retrain", 1, oneof="algo"),
            Field("optional", "WtsULQRetrain", "ulq_retrain", 2, oneof="algo"),
        ),
        "ARQRetrain": _WEIGHT_SETTINGS,
        "WtsULQRetrain": _WEIGHT_SETTINGS,
        "PruneConfig": (
            Field("optional", "FilterPruner", "filter_pruner", 1, oneof="pruner"),
            Field("optional", "NOutOfMPruner", "n_out_of_m_pruner", 2, oneof="pruner"),
        ),
        "FilterPruner": (
            Field("optional", "BalancedL2NormFilterPruner", "balanced_l2_norm_filter_prune", 1, oneof="algo"),
        ),
        "BalancedL2NormFilterPruner": (
            Field("required", "float", "prune_ratio", 1),
            Field("optional", "bool", "ascend_optimized", 2, "true"),
        ),
        "NOutOfMPruner": (Field("optional", "L1SelectivePruner", "l1_selective_prune", 1, oneof="algo"),),
        "L1SelectivePruner": (
            Field("optional", "NOutOfMType", "n_out_of_m_type", 1, "M4N2"),
            Field("optional", "uint32", "update_freq", 2, "0"),
        ),
    }
)

_ENUMS: Final = MappingProxyType(
    {
        "DataType": {"INT4": 0, "INT8": 1, "INT16": 2},
        "NOutOfMType": {"M4N2": 0},
        "AMCTRetrainConfig.FakequantPrecisionMode": {"FORCE_FP16_QUANT": 1},
    }
)

SIMPLE_SCHEMA: Final = Schema("amct_lightning/config/retrain_config.proto", _MESSAGES, _ENUMS)
"""The messages of a ``.cfg`` file; the root is ``AMCTRetrainConfig``."""
