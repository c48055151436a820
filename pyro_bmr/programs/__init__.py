"""Pyro programs under masks and under other priors: handlers, distributions, dry runs, model runs."""
