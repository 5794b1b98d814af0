"""How ranks share a model: the partition of its tensors, and one file for each sharding strategy."""
