"""From torch to Pyro: networks whose weights are sample sites."""
