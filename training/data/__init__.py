"""Images with the truth about them: folders, phantoms, near-duplicates, splits."""
