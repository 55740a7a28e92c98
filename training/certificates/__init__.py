"""Certificates of many images, in a file that a stopped run continues."""
