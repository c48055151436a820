"""Results in files: tensors and a plan in JSON, nothing that runs when it is read."""
