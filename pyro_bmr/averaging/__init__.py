"""How probable each element is, and averages over what may be there."""
