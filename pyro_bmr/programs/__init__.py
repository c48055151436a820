"""Pyro programs under masks and other priors, at given values, and in dry runs."""
