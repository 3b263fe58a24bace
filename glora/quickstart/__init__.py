"""The demonstration on real data: ``glora quickstart``."""
