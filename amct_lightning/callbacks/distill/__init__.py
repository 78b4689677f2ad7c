"""Distillation: the float model as it was at conversion teaches the quantized one."""
