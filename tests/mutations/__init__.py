"""Faults planted in the product, each of which the tests must notice: run on the pretended card (make test-card)."""
