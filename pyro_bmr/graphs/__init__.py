"""A model as a graph of tensor operations, and questions about such graphs."""
