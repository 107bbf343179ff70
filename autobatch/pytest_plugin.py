"""The pytest option ``--virtual-gpu``."""
