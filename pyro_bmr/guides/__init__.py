"""Guides read as factors, and the guide that a reduction returns."""
