"""The mathematics: the sign of ΔF, Gaussians, conjugate families, searches for sets."""
