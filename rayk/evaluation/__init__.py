"""Measurements of models on held-out rows."""
