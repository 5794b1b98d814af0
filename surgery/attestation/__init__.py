"""Proof that 4-bit weights are, bit for bit, what was quantized: at rest, and as forward sees them."""
