"""VTAB-1K in miniature, for the tests and for trying the commands: generated images in the real layout."""
