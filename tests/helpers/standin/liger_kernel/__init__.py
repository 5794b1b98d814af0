"""A stand-in for Liger-Kernel 0.8, whose kernels need a GPU: the same names, applied in the same manner, in torch.

For `sys.path`: the folder beside this package. `CALLS` counts what ran.
"""

from __future__ import annotations

from collections import Counter

CALLS: Counter[str] = Counter()
