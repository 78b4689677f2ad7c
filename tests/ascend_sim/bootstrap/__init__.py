"""On PYTHONPATH of the processes with simulated devices; only sitecustomize is for them."""
