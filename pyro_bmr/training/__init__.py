"""Training: fit and prune, in compiled steps, with checkpoints."""
