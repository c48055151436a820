"""Looking at models and guides: what was predicted of them, and how they compare."""
