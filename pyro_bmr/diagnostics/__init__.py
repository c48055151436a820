"""What ArviZ and others look at: draws in its format, and checks of predictions."""
