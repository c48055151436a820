"""Means and variances of Gaussian weights through torch functions."""
