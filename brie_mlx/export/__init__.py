"""From a checkpoint to the formats other tools read."""
