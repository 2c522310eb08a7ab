"""Constraint programs (OR-Tools CP-SAT), one folder each: `program.py` states the maths and builds the model."""
