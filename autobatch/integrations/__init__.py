"""Trainers of other libraries: each file translates, the probe and the plan do the work."""
