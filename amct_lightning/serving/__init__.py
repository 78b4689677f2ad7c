"""Checkpoints that servers of language models load: writing them, reading them back, and comparing."""

from amct_lightning.serving.functions import load_serving, save_serving, verify_serving

__all__ = ["load_serving", "save_serving", "verify_serving"]
