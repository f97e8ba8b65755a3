"""One training loop for all models; what differs between them is a `Task` in a file of its own."""
