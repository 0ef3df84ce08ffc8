"""philox.py and the masks of dropout.py inside Triton kernels: the same words and masks, bit for bit.

One call of the generator decides for 8 columns, so it runs on a tile of (rows, columns / 8) and its words are spread
over the columns afterwards, each thread keeping 8 neighbours: no exchange. In the first two rounds the counter's words
are still one a row or one a column, so a call costs 8 full rounds: 16 wide multiplications, 16 xors.
"""

import triton
import triton.language as tl

from distlora_kernels.offline import Case

OFFLINE: tuple[Case, ...] = ()
"""No kernel is here; these functions are compiled in those of skinny_triton."""


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Four random words of the counters' common shape: Philox-4x32-10. All are uint32; shapes broadcast."""
    for _ in tl.static_range(10):
        h0 = tl.umulhi(c0, 0xD2511F53)
        h1 = tl.umulhi(c2, 0xCD9E8D57)
        l0 = c0 * 0xD2511F53
        l1 = c2 * 0xCD9E8D57
        c0 = h1 ^ c1 ^ k0
        c2 = h0 ^ c3 ^ k1
        c1 = l1
        c3 = l0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropped_tile(k0, k1, threshold, step, row, position, first_column, COLUMNS: tl.constexpr):
    """(BM, COLUMNS) bool, true where dropout.dropped is: columns from `first_column` on, a multiple of 8.

    k0, k1 and step are words as int32, threshold an int32, row (BM,) int64 and position (BM,) integers.
    """
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = philox(
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
        call.to(tl.uint32)[None, :],
        position.to(tl.uint32)[:, None],
        row.to(tl.uint32)[:, None],
        step.to(tl.uint32, bitcast=True),
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) ^ 0x80008000
    # Signed h < threshold - 2^15 is unsigned (h ^ 2^15) < threshold, and that is so of 2^16 times either side and of
    # what lies below: each half is compared where it is the high one.
    return tl.interleave(words << 16, words) < (threshold.to(tl.uint32) << 16)
