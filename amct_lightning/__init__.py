"""Quantization-aware training for Ascend hardware in PyTorch Lightning."""
