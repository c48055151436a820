"""Checks of predictions, comparisons, what ArviZ looks at, and the draws for all of these."""
