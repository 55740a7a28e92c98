"""What both services and all their clients share: the wire formats, their limits, and one table of errors."""
