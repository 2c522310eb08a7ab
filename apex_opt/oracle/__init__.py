"""The oracle: what a plan must satisfy, in plain Python.

Every plan that a program finds or a user gives is checked here. It shares no code with the formulations, so that a
mistake in one shows as a disagreement with the other.
"""
