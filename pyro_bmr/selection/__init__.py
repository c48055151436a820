"""What to drop: scores, groups and selections."""
