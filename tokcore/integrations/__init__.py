"""Bridges to other libraries: the only place that imports third parties beyond torch and numpy."""
