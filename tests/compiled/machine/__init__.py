"""A machine that executes PTX: a program's text, its threads, and the memories that they share."""
