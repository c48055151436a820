"""Posteriors and models under reduced priors that are not a spike."""
