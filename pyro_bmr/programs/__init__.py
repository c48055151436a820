"""Pyro programs under masks: handlers, distributions, sites, dry runs."""
