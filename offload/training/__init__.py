"""Training while weights are streamed."""
