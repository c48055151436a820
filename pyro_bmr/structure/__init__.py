"""Which indices of which tensors of a model are the same unit."""
