"""The model to be defended: its training, and its use within this process."""
