"""Decisions: what lives where, what moves when. Pure, and without torch."""
