"""From a float model and a configuration to a quantized one: the plan, the conversion, and the table that tells of it."""
