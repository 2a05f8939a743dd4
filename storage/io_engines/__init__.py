"""Ways to read a file into memory."""
