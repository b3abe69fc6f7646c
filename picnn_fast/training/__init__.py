"""Training: ``config`` (options), ``module`` (Lightning), ``run`` (a run, its folder), ``demo``."""
