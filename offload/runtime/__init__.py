"""The executor and what it drives."""
