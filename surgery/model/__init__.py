"""Module trees: walking, naming, building on meta, and matching with the tensors of a checkpoint."""
