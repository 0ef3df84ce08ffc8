// Products of panels, summed in fp32: what attention.cpp and products.cpp share. A panel is LANES columns of a
// right-hand side, row after row.
#pragma once

#include <cstring>
#include <type_traits>

#include "vectors.h"

static inline Ints everywhere(const float *cell) { return bits(all(*cell)); }
static inline Ints everywhere(const Pair *cell) {
    int bits;
    memcpy(&bits, cell, sizeof(bits));
    return SIMD(set1_epi32)(bits);
}
static inline Ints vector_at(const void *cells) { return load_bits(cells); }
static inline Ints vector_at(const bf16 *numbers) { return bits(load(numbers)); }

// C (R, V vectors) = A (R, P) B (P, V vectors), or += it, of cells; rows of B are `ldb` apart. Where cells are fp32, pairs
// of one side are taken apart as they are read, beside two cells of the other, and bf16 of B are widened. With `fetches`,
// P cache lines from `ahead` on are brought nearer.
template <size_t R, size_t V, bool fetches = false, typename Left, typename Right>
static inline void product_of(const Left *A, size_t lda, const Right *B, size_t ldb, float *C, size_t ldc, size_t P,
                              bool add, const Right *ahead = nullptr) {
    constexpr bool left = DEEP == 1 && std::is_same<Left, Pair>::value;
    constexpr bool right = DEEP == 1 && std::is_same<Right, Pair>::value;
    constexpr size_t N = left || right ? 2 : 1;
    Floats sums[R][V];
    for (size_t r = 0; r < R; r++)
        for (size_t v = 0; v < V; v++) sums[r][v] = add ? load(C + r * ldc + v * VECTOR) : all(0.f);
    for (size_t p = 0; p < P; p++) {
        Ints b[N][V];
        if (fetches) _mm_prefetch((const char *)(ahead + p * 16), _MM_HINT_T1);
        for (size_t i = 0; i < N; i++)
            for (size_t v = 0; v < V; v++) {
                b[i][v] = vector_at(B + (right ? p : N * p + i) * ldb + v * VECTOR);
                if (right) b[i][v] = bits(i ? second_of(b[i][v]) : first_of(b[i][v]));
            }
        for (size_t r = 0; r < R; r++)
            for (size_t i = 0; i < N; i++) {
                Ints a = everywhere(A + r * lda + (left ? p : N * p + i));
                if (left) a = bits(i ? second_of(a) : first_of(a));
                for (size_t v = 0; v < V; v++) sums[r][v] = plus_product(sums[r][v], a, b[i][v]);
            }
    }
    for (size_t r = 0; r < R; r++)
        for (size_t v = 0; v < V; v++) store(C + r * ldc + v * VECTOR, sums[r][v]);
}

template <size_t V, typename Left, typename Right>
static void product_of_rows(const Left *A, size_t lda, const Right *B, size_t ldb, float *C, size_t ldc, size_t M,
                            size_t P, bool add) {
    size_t r = 0;
    if (V == 1)
        for (; r + 12 <= M; r += 12) product_of<12, V>(A + r * lda, lda, B, ldb, C + r * ldc, ldc, P, add);
    for (; r + 6 <= M; r += 6) product_of<6, V>(A + r * lda, lda, B, ldb, C + r * ldc, ldc, P, add);
    for (; r + 2 <= M; r += 2) product_of<2, V>(A + r * lda, lda, B, ldb, C + r * ldc, ldc, P, add);
    if (r < M) product_of<1, V>(A + r * lda, lda, B, ldb, C + r * ldc, ldc, P, add);
}

// The same for a panel of pairs that more follow: while it is multiplied by some rows, the next one comes from memory.
[[maybe_unused]] static void product_with_kept(const Cell *A, size_t lda, const Pair *B, float *C, size_t M, size_t P, bool add) {
    const Pair *ahead = B + P * LANES;
    size_t r = 0;
    auto rows = [&](auto count) {
        constexpr size_t R = decltype(count)::value;
        for (; r + R <= M; r += R, ahead += P * 16)
            if (ahead < B + 2 * P * LANES)
                product_of<R, WIDE, true>(A + r * lda, lda, B, LANES, C + r * LANES, LANES, P, add, ahead);
            else product_of<R, WIDE>(A + r * lda, lda, B, LANES, C + r * LANES, LANES, P, add);
    };
    rows(std::integral_constant<size_t, 6>());
    rows(std::integral_constant<size_t, 4>());
    rows(std::integral_constant<size_t, 2>());
    rows(std::integral_constant<size_t, 1>());
}

// left (M, K) times a weight (N, K), or, transposed, (K, N). products.py has the same fields.
struct Term {
    const bf16 *left;
    size_t left_stride, K;
    const bf16 *dense;  // The weight where it is not quantized, its rows contiguous; else null.
    size_t dense_stride;
    const uint8_t *codes, *scales;
    const float *group_scale, *offset, *absmax;  // Without double quantization absmax, else null.
    const float *levels, *map;
    const Pair *panels;  // The weight (N, K) as `pack_bf16` leaves it, in place of the others; else null.

    size_t pairs() const { return (K + 1) / 2; }
    const bf16 *rows(size_t m) const { return left + m * left_stride; }
};

// Where a sum goes, and what is added to it. products.py has the same fields.
struct Output {
    bf16 *rows;
    size_t stride, N;
    const bf16 *bias, *added;  // Null: there is none.
    size_t added_stride;
    float factor;
};

EXPORTED int weighted_sum_bf16(const Term *terms, size_t num_terms, int transposed, const Output *output, size_t M);
