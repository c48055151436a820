"""The same program on smaller tensors, and which units it can do without."""
