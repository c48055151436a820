"""The priors of sample sites, read from the model."""
