"""Workloads that child processes import by name."""
