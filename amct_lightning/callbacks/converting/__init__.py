"""How the callback converts a model in ``setup``: when, by which plan, on which input its data flow is seen."""
