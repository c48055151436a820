"""The mathematics: the sign of ΔF, Gaussians, conjugate families, reduced priors and posteriors."""
