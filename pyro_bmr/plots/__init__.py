"""Figures of what a reduction found; each takes axes, and returns those that it drew on."""
