"""The optimizers of a training: where the clips stand in them, and at which rate."""
