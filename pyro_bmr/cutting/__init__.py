"""The same program on smaller tensors, and the proof that it computes the same."""
