"""Choose up to how many rows a quantized weight is decoded inside the product, by compute capability. Imports no torch.

fused.py chooses by it, and the planner counts by it without a GPU.

The numbers are predicted, not measured. Cost per weight, in ps (10^-12 s):
    scratch   2.516 B / bandwidth + max(2 B / bandwidth, 2 M flop / rate)
    fused     ceil(M / rows) * (6.5 to 11 instructions / issue rate + 2 rows flop / rate), not overlapped
with rows = rows per program of fused_triton.py (128 on sm_90, else 64) and rates at 85 % of the data sheet's.
"""

from __future__ import annotations

# Compute capability -> most rows M for the fused product.
_MOST_ROWS = {
    # A100, 1.9 TB/s, 270 TF/s: at 64 rows 1.2 against 2.4, at 128 a tie.
    (8, 0): 64,
    # A10, 0.6 TB/s, 60 TF/s: at 128 rows 5.8 against 7.9, at 256 11.7 against 12.7.
    (8, 6): 128,
    # RTX 4090, 0.95 TB/s, 150 TF/s, L40S alike: at 256 rows 4.5 against 6.0, at 512 a tie.
    (8, 9): 256,
    # H100, 3.0 TB/s, 700 TF/s: at 128 rows 0.7 against 1.5, at 256 1.4 against 1.6, at 384 2.1 against 1.9.
    (9, 0): 256,
    # B200, 7.5 TB/s, 1700 TF/s: at 64 rows 0.3 against 0.6, at 128 0.6 against 0.6.
    (10, 0): 64,
}
_MOST_ROWS_ELSEWHERE = 64
"""Below this number of rows decoding is cheaper on every GPU above."""


def max_fused_rows(capability: tuple[int, int]) -> int:
    """Return the most rows M; both costs are proportional to the weight's size, so only M decides."""
    return _MOST_ROWS.get(capability, _MOST_ROWS_ELSEWHERE)
