"""Measurements of speed, and the peers they are made against; see README.md."""
