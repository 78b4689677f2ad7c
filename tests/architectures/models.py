"""Architectures of the transformers library: tiny, with random weights, built without any download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LABELS, WORDS = 3, 20
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {"image_size": 32, "patch_size": 16}
SPEECH = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
SEQ2SEQ = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
STRONG = {"initializer_range": 0.5}  # or the signal dies in so narrow layers
CALM = {"layerdrop": 0.0, "mask_time_prob": 0.0}  # every layer runs in every step
Inputs = Callable[[], dict[str, Any]]


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), **classes()}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16), **classes()}


def segmentation() -> dict[str, Any]:
    return {**images(), "labels": torch.zeros(2, 32, 32, dtype=torch.long)}


def detection() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def words(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, WORDS, (batch, length))


def classes() -> dict[str, Any]:
    return {"labels": torch.tensor([0, 1])}


def text() -> dict[str, Any]:
    return {"input_ids": words(), "attention_mask": torch.ones(2, 6, dtype=torch.long), **classes()}


def language() -> dict[str, Any]:
    return {"input_ids": words(), "labels": words()}


def many_words() -> dict[str, Any]:
    return {"input_ids": words(4, 16), "labels": words(4, 16)}


def long_text() -> dict[str, Any]:
    return {"input_ids": words(2, 8), **classes()}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400), **classes()}


def spectrogram() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 20), "labels": words()}


def frames() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 20, 8), "labels": words()}


def pairs() -> dict[str, Any]:
    return {"input_ids": words(), "pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True}


def series() -> dict[str, Any]:
    return {"past_values": torch.randn(2, 16, 2), "future_values": torch.randn(2, 4, 2)}


@dataclass(frozen=True, eq=False)
class Architecture:
    """How to build a model, what to feed it, and what of it stays in float.

    Attributes:
        model: Name of the model class; its config class has the same beginning.
        config: Arguments of the config class.
        inputs: Makes the arguments of the forward.
        in_float: Regular expression for the layers of supported types that stay in float.
    """

    model: str
    config: dict[str, Any]
    inputs: Inputs
    in_float: str = r"(?!)"

    def __str__(self) -> str:
        return self.model

    def build(self) -> nn.Module:
        model = getattr(transformers, self.model)
        return model(model.config_class(**self.config))


def head(base: str, inputs: Inputs, in_float: str = r"(?!)", **config: Any) -> Architecture:
    """A base model with a classification head."""
    kind = {video: "Video", images: "Image"}.get(inputs, "Sequence")
    return Architecture(f"{base}For{kind}Classification", {**config, "num_labels": LABELS}, inputs, in_float)


def lm(
    base: str, inputs: Inputs = language, in_float: str = r"(?!)", kind: str = "CausalLM", **config: Any
) -> Architecture:
    """A language model; text goes in and comes out."""
    # The defaults of special tokens lie beyond the small vocabulary.
    tokens = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return Architecture(f"{base}For{kind}", {**tokens, **config}, inputs, in_float)


RESNET_CLASSIFIER = head("ResNet", images, **RESNET)
BERT = head("Bert", text, vocab_size=WORDS, **SMALL)
ALBERT = head("Albert", text, r"albert_layers", vocab_size=WORDS, embedding_size=4, **SMALL)
SWITCH = lm(
    "SwitchTransformers",
    many_words,
    kind="ConditionalGeneration",
    d_model=8,
    d_kv=4,
    d_ff=16,
    num_heads=2,
    num_layers=2,
    num_decoder_layers=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    num_experts=2,
    expert_capacity=64,
    router_jitter_noise=0.0,
    dropout_rate=0.0,
)

ARCHITECTURES = [
    RESNET_CLASSIFIER,
    head("RegNet", images, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], groups_width=4),
    head("ConvNext", images, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=4),
    head("MobileNetV1", images, depth_multiplier=0.1, min_depth=2, classifier_dropout_prob=0.0),
    head("MobileNetV2", images, depth_multiplier=0.1, min_depth=2, depth_divisible_by=2),  # pads as the input demands
    head(
        "EfficientNet",
        images,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        hidden_dim=320,
        kernel_sizes=[3, 5],
        in_channels=[32, 16],
        out_channels=[16, 24],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 4],
        depthwise_padding=[],
        **STRONG,
    ),
    head("ViT", images, **VISION, **SMALL),
    head("DeiT", images, **VISION, **SMALL),
    head("Beit", images, **VISION, **SMALL),
    head("Swin", images, image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    head("VideoMAE", video, image_size=16, patch_size=8, num_frames=4, **SMALL),
    Architecture(
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8], "patch_sizes": [7, 3]}
        | {"strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8},
        segmentation,
    ),
    Architecture(
        "DetrForObjectDetection",
        {"backbone_config": transformers.ResNetConfig(**RESNET, out_features=["stage2"]), "num_queries": 4} | SEQ2SEQ,
        detection,
    ),
    BERT,
    head("DistilBert", text, vocab_size=WORDS, dim=8, n_layers=2, n_heads=2, hidden_dim=16),
    ALBERT,
    head("DebertaV2", text, vocab_size=WORDS, relative_attention=True, pos_att_type=["c2p", "p2c"], **SMALL),
    head("Longformer", long_text, vocab_size=WORDS, attention_window=[4, 4], max_position_embeddings=32, **SMALL),
    # Its projections are a Conv1D of the transformers library, which is no torch layer.
    head("GPT2", text, vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=2, n_head=2, pad_token_id=0),
    lm("Llama", **SMALL),
    lm("Mamba", in_float=r"conv1d|dt_proj", hidden_size=8, state_size=4, num_hidden_layers=2),
    # Its experts share one three-dimensional parameter and are no layers.
    lm("Mixtral", num_key_value_heads=1, num_local_experts=4, **SMALL),
    SWITCH,
    lm("T5", kind="ConditionalGeneration", d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
    lm("Bart", kind="ConditionalGeneration", max_position_embeddings=16, **SEQ2SEQ),
    lm(
        "Whisper",
        spectrogram,
        kind="ConditionalGeneration",
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=10,
        **SEQ2SEQ,
    ),
    lm("Speech2Text", frames, kind="ConditionalGeneration", input_feat_per_channel=8, conv_channels=8, **SEQ2SEQ),
    head("Wav2Vec2", sound, **SPEECH, **SMALL, **CALM),
    Architecture(
        "CLIPModel",
        {
            "text_config": {"vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2, **SMALL},
            "vision_config": {**VISION, **SMALL},
            "projection_dim": 8,
        },
        pairs,
    ),
    Architecture(
        "PatchTSTForPrediction",
        {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2, "prediction_length": 4}
        | {"d_model": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16},
        series,
    ),
]
