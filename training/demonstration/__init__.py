"""The stages of the demo, and what it tells at its end."""
