"""What a checkpoint keeps of a quantized model, the record beside it, and the way back."""
