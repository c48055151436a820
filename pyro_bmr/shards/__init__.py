"""Posteriors in files, a chunk at a time."""
