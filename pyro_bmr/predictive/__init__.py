"""Draws of a model and its guide, many at once."""
