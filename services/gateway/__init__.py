"""The defended front door: sanitizes what clients send, forwards it, and returns the victim's answer."""
