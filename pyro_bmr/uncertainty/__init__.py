"""How sure a selection is: many models, and their weights."""
