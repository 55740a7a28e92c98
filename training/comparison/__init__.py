"""Defences compared at equal numbers of queries."""
