"""A quantized layer as one operation for autograd, which keeps for backward what the float layer keeps."""
