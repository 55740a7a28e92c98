"""The tables and figures of the report."""

from typing import Final

FILE_NAME: Final = "report.html"
"""The report's file, where --out does not name another."""
