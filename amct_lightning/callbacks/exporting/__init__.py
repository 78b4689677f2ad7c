"""Exporting the trained model at the end of fit."""
