"""What every command shares: errors, arguments, child processes, provenance."""
