"""What a person runs: `python -m training.<verb>`, one module a verb."""
