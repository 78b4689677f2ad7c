"""Where ranges and scales start: the choices besides AMCT's, each found by a search at the start of training."""
