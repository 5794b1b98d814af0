"""A training step: fused 4-bit LoRA, kernels of others, compiled blocks, CUDA graphs, activations that wait."""
