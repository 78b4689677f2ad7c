"""From a model to one graph in ONNX, with a node per call of a quantized layer."""
