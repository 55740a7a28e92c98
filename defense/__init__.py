"""What is learned, and what can be proved about it: pure PyTorch, no sockets, no command line."""
