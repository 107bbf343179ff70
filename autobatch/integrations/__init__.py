"""Trainers of other libraries: each folder translates one, the probe and the plan do the work."""
