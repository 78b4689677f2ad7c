"""From a float model and a configuration to a quantized one: the plan, the conversion, the table that tells of it."""
