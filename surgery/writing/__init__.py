"""Checkpoints written by streaming: quantized, dequantized, merged, exported; whole, or absent."""
