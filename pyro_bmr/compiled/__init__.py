"""Compiled training steps, and all that they need."""
