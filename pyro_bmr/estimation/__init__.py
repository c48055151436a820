"""Estimators of the free energy and of its gradient."""
