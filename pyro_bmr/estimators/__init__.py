"""Estimators of the free energy and of its gradient, moments among them, and its measurement."""
