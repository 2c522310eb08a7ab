"""Measured serving runs: readers of their files, and their comparison with what is simulated."""
