"""Defenses compared at equal numbers of queries."""
