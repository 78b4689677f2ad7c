"""``amct-lightning export`` and ``verify``: from a checkpoint to ONNX files, and the proof that they are right."""
