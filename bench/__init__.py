"""Measurements of speed, and the peers that ours is compared with; see README.md."""
