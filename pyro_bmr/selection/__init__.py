"""Selection: the problem, scores of elements and groups, selections, the decision and its table."""
