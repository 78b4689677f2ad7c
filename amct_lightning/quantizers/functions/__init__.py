"""The fake quantization of activations and weights, with gradients."""
