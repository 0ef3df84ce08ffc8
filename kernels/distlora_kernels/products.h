// Products of pairs of bf16, summed in fp32, by AVX512-BF16: what attention.cpp and products.cpp share. The letters are
// attention.cpp's: a panel is LANES columns of a right-hand side, row after row.
#pragma once

#include <immintrin.h>
#include <type_traits>

#include "numbers.h"

constexpr size_t LANES = 64, VECTOR = 16;

// Two bf16 as they lie in memory, wherever that is.
typedef uint32_t Pair __attribute__((may_alias, aligned(2)));

static inline size_t up(size_t count, size_t to) { return (count + to - 1) / to * to; }

// C (R, 16 V) = A (R, P) B (P, 16 V), or += it: of pairs, so the sum is over 2 P. B lies in a panel. With `fetches`, P
// cache lines from `ahead` on are brought nearer.
template <size_t R, size_t V, bool fetches = false>
static inline void product_of(const Pair *A, size_t lda, const uint32_t *B, float *C, size_t ldc, size_t P, bool add,
                              const uint32_t *ahead = nullptr) {
    __m512 sums[R][V];
    for (size_t r = 0; r < R; r++)
        for (size_t v = 0; v < V; v++)
            sums[r][v] = add ? _mm512_loadu_ps(C + r * ldc + v * VECTOR) : _mm512_setzero_ps();
    for (size_t p = 0; p < P; p++) {
        __m512bh b[V];
        if (fetches) _mm_prefetch((const char *)(ahead + p * VECTOR), _MM_HINT_T1);
        for (size_t v = 0; v < V; v++) b[v] = (__m512bh)_mm512_loadu_si512(B + p * LANES + v * VECTOR);
        for (size_t r = 0; r < R; r++) {
            __m512bh a = (__m512bh)_mm512_set1_epi32((int)A[r * lda + p]);
            for (size_t v = 0; v < V; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, b[v]);
        }
    }
    for (size_t r = 0; r < R; r++)
        for (size_t v = 0; v < V; v++) _mm512_storeu_ps(C + r * ldc + v * VECTOR, sums[r][v]);
}

template <size_t V>
static void product_of_rows(const Pair *A, size_t lda, const uint32_t *B, float *C, size_t ldc, size_t M, size_t P,
                            bool add) {
    size_t r = 0;
    for (; r + 6 <= M; r += 6) product_of<6, V>(A + r * lda, lda, B, C + r * ldc, ldc, P, add);
    for (; r + 4 <= M; r += 4) product_of<4, V>(A + r * lda, lda, B, C + r * ldc, ldc, P, add);
    for (; r + 2 <= M; r += 2) product_of<2, V>(A + r * lda, lda, B, C + r * ldc, ldc, P, add);
    if (r < M) product_of<1, V>(A + r * lda, lda, B, C + r * ldc, ldc, P, add);
}

// The same for a panel that more follow: while it is multiplied by some rows, the next one comes from memory.
static void product_with_kept(const Pair *A, size_t lda, const uint32_t *B, float *C, size_t M, size_t P, bool add) {
    const uint32_t *ahead = B + P * LANES;
    size_t r = 0;
    auto rows = [&](auto count) {
        constexpr size_t R = decltype(count)::value;
        for (; r + R <= M; r += R, ahead += P * VECTOR)
            if (ahead < B + 2 * P * LANES)
                product_of<R, 4, true>(A + r * lda, lda, B, C + r * LANES, LANES, P, add, ahead);
            else product_of<R, 4>(A + r * lda, lda, B, C + r * LANES, LANES, P, add);
    };
    rows(std::integral_constant<size_t, 6>());
    rows(std::integral_constant<size_t, 4>());
    rows(std::integral_constant<size_t, 2>());
    rows(std::integral_constant<size_t, 1>());
}

static inline void transpose(__m512i x[16]) {
    __m512i y[16];
    for (size_t i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4)
        for (size_t j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    for (size_t c = 0; c < 4; c++) {  // Quarter q of x[4 i + c] has column 4 q + c of rows 4 i to 4 i + 3.
        __m512i even = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), odd = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
        y[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        y[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        y[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (size_t i = 0; i < 16; i++) x[i] = y[i];
}

// left (M, K) times a weight (N, K), or, transposed, (K, N). lora_native.py has the same fields.
struct Term {
    const bf16 *left;
    size_t left_stride, K;
    const bf16 *dense;  // The weight where it is not quantized, contiguous; else null.
    const uint8_t *codes, *scales;
    const float *group_scale, *offset, *absmax;  // Without double quantization absmax, else null.
    const float *levels, *map;
    const uint32_t *panels;  // The weight (N, K) as `pack_bf16` leaves it, in place of the others; else null.

    size_t pairs() const { return (K + 1) / 2; }
    const Pair *rows(size_t m) const { return (const Pair *)(left + m * left_stride); }
};

EXPORTED int weighted_sum_bf16(const Term *terms, size_t num_terms, int transposed, const bf16 *bias, bf16 *out, size_t M,
                               size_t N);
