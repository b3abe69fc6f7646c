"""Training: ``options``, ``module`` (Lightning), ``run`` (assemble, fit), ``launch``, ``demo``."""
