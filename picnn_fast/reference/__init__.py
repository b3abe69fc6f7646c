"""Plain PyTorch definitions of every operator: slow, short, and the authority on what is right."""
