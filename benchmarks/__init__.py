"""Measurements of the project's own speed, as ratios within one run."""
