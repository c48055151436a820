"""Posteriors from elsewhere: a mean and a covariance, with a Gaussian prior and names."""
