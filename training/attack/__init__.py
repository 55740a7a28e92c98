"""Attackers by what they know: oblivious, outsider, insider."""
