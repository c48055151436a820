"""Factors: the independent pieces of a posterior, with their priors."""
