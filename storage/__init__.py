"""Bytes and their movement between tiers. Knows nothing of models."""
