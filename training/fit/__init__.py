"""How a sanitizer is learned: pre-training, probe of the victim, training loop, student, checkpoints."""
