"""What users pass: options of the right kind, and data of other libraries as tensors."""
