"""What each operator costs, measured beside its alternatives: ``make bench``."""
