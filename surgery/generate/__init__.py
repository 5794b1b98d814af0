"""Text from a base model and an adapter that was trained on it: `surgery generate`."""
