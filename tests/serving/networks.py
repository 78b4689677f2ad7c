"""Small decoders, as they are converted for servers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat

TOKENS = torch.arange(24).view(3, 8) * 5 % 16
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
FLOAT_HEAD: dict[str, Any] = {"skip_layers": ["lm_head"]}


def decoder(kind: str = "Qwen2", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **settings: Any) -> nn.Module:
    """A decoder with biases that are not 0, loaded in a dtype as ``from_pretrained`` does it."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data = (parameter + 0.05 * torch.randn_like(parameter)).detach().to(dtype)
    return model


def converted(model: nn.Module, config: Any = None, target: str = "serving") -> nn.Module:
    """The decoder, calibrated, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*worth a second look")
        quantized = prepare_qat(model, FLOAT_HEAD if config is None else config, TOKENS, target=target)
    calibrate(quantized, [TOKENS])
    return quantized.eval()


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """What it says of the next tokens."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def source(model: nn.Module, folder: Path) -> Path:
    """The folder of the float network, with a tokenizer and files that are not to be copied."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "modeling_custom.py"):
        (folder / name).write_text("{}")
    return folder
