"""From a checkpoint to a model with real parameters, and what its blocks are."""
