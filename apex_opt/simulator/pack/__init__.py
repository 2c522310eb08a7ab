"""The only door to the compiled kernel: lays out its memory, calls it, and reads the results."""
