"""Finds the largest training batch that fits a GPU."""

__version__ = "0.1.0"
