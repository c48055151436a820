"""Searches among sets of correlated elements."""
