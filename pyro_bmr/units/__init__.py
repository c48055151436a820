"""Units: which indices of which tensors are one unit, and which of them anything needs."""
