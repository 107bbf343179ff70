"""Measurements behind the claims: each module runs by itself and writes JSON with its environment."""
