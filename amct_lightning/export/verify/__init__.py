"""Proving exported files equal to the model that they were exported from."""
