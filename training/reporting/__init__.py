"""The tables and figures of the report."""
