// Vectors of fp32 in the widest registers of the path that is compiled, AVX-512 or AVX2, and operands of products.
//
// Products sum in fp32. With AVX512-BF16 their operands are pairs of bf16, which one instruction multiplies; elsewhere
// they are fp32. Either is a Cell of four bytes, which holds DEEP of the numbers that are summed.
#pragma once

#include <immintrin.h>

#include "numbers.h"

#ifdef __AVX512F__
typedef __m512 Floats;
typedef __m512i Ints;
typedef __mmask16 Mask;
#define SIMD(NAME) _mm512_##NAME
#else
typedef __m256 Floats;
typedef __m256i Ints;
typedef __m256i Mask;
#define SIMD(NAME) _mm256_##NAME
#endif

constexpr size_t VECTOR = sizeof(Floats) / sizeof(float);
constexpr size_t WIDE = VECTOR == 16 ? 4 : 2;  // Vectors of a panel: with six rows of sums they fill the registers.
constexpr size_t LANES = WIDE * VECTOR;

// Two bf16 as they lie in memory.
struct Pair {
    bf16 numbers[2];
};

#ifdef __AVX512BF16__
typedef Pair Cell;     // What is multiplied at once.
typedef bf16 Element;  // What a Cell holds DEEP of.
#else
typedef float Cell;
typedef float Element;
#endif
constexpr size_t DEEP = sizeof(Cell) / sizeof(Element);

static inline size_t up(size_t count, size_t to) { return (count + to - 1) / to * to; }
static inline size_t cells(size_t count) { return (count + DEEP - 1) / DEEP; }

static inline Floats load(const float *from) { return SIMD(loadu_ps)(from); }
static inline void store(float *to, Floats values) { SIMD(storeu_ps)(to, values); }
static inline Floats all(float value) { return SIMD(set1_ps)(value); }
static inline Floats fused(Floats a, Floats b, Floats c) { return SIMD(fmadd_ps)(a, b, c); }  // a b + c
static inline Floats larger(Floats a, Floats b) { return SIMD(max_ps)(a, b); }  // b where one is NaN.

#ifdef __AVX512F__
static inline Floats floats(Ints bits) { return _mm512_castsi512_ps(bits); }
static inline Ints bits(Floats values) { return _mm512_castps_si512(values); }
static inline Ints load_bits(const void *from) { return _mm512_loadu_si512(from); }
static inline void store_bits(void *to, Ints values) { _mm512_storeu_si512(to, values); }
static inline Ints widened(__m256i halves) { return _mm512_cvtepu16_epi32(halves); }
static inline __m256i halves_at(const bf16 *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
static inline Floats scaled(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }
static inline Floats sixteenth(const float *table, Ints index) {
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}
static inline Mask lanes_before(size_t end) { return (Mask)(end < VECTOR ? (1u << end) - 1 : 0xffff); }
static inline Mask without(Mask all, Mask less) { return (Mask)(all & ~less); }
static inline Floats chosen(Mask mask, Floats values) { return _mm512_maskz_mov_ps(mask, values); }
static inline Floats chosen(Mask mask, Floats values, Floats others) { return _mm512_mask_mov_ps(others, mask, values); }
static inline Ints load_bits(Mask mask, const void *from) { return _mm512_maskz_loadu_epi32(mask, from); }
static inline void store_bits(Mask mask, void *to, Ints values) { _mm512_mask_storeu_epi32(to, mask, values); }
static inline float sum_of(Floats values) { return _mm512_reduce_add_ps(values); }
static inline float largest_of(Floats values) { return _mm512_reduce_max_ps(values); }
#else
static inline Floats floats(Ints bits) { return _mm256_castsi256_ps(bits); }
static inline Ints bits(Floats values) { return _mm256_castps_si256(values); }
static inline Ints load_bits(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void store_bits(void *to, Ints values) { _mm256_storeu_si256((__m256i *)to, values); }
static inline Ints widened(__m128i halves) { return _mm256_cvtepu16_epi32(halves); }
static inline __m128i halves_at(const bf16 *from) { return _mm_loadu_si128((const __m128i *)from); }
static inline Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^power, for a whole power from -126 on; infinite where it is over 127.
static inline Floats scaled(Floats x, Floats power) {
    Floats most = _mm256_min_ps(power, all(127.f));
    Ints exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(most), _mm256_set1_epi32(127)), 23);
    Floats rest = _mm256_blendv_ps(all(1.f), all(INFINITY), _mm256_cmp_ps(power, all(127.f), _CMP_GT_OQ));
    return x * floats(exponent) * rest;
}
static inline Floats sixteenth(const float *table, Ints index) {
    Floats low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    Floats high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, floats(_mm256_slli_epi32(index, 28)));
}
static inline Mask lanes_before(size_t end) {
    int most = end < VECTOR ? (int)end : (int)VECTOR;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(most), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Mask without(Mask all, Mask less) { return _mm256_andnot_si256(less, all); }
static inline Floats chosen(Mask mask, Floats values) { return floats(mask & bits(values)); }
static inline Floats chosen(Mask mask, Floats values, Floats others) {
    return _mm256_blendv_ps(others, values, floats(mask));
}
static inline Ints load_bits(Mask mask, const void *from) { return _mm256_maskload_epi32((const int *)from, mask); }
static inline void store_bits(Mask mask, void *to, Ints values) { _mm256_maskstore_epi32((int *)to, mask, values); }
template <typename Fold> static inline float folded(Floats values, Fold fold) {
    __m128 four = fold(_mm256_extractf128_ps(values, 1), _mm256_castps256_ps128(values));
    __m128 two = fold(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(fold(two, _mm_movehdup_ps(two)));
}
static inline float sum_of(Floats values) {
    return folded(values, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
static inline float largest_of(Floats values) {
    return folded(values, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#endif

// What stands for a mask where no lane is left out.
struct Whole {};
static inline Floats chosen(Whole, Floats values) { return values; }
static inline Floats chosen(Whole, Floats values, Floats) { return values; }

// Of pairs, the first and the second number in fp32, and back; the second's low half must be 0.
static inline Floats first_of(Ints pairs) { return floats(SIMD(slli_epi32)(pairs, 16)); }
static inline Floats second_of(Ints pairs) { return floats(pairs & SIMD(set1_epi32)((int)0xffff0000)); }
static inline Ints pairs_of(Floats first, Floats second) { return SIMD(srli_epi32)(bits(first), 16) | bits(second); }

static inline Floats load(const bf16 *from) { return floats(SIMD(slli_epi32)(widened(halves_at(from)), 16)); }

// fp32 -> bf16 in fp32, as `narrow` rounds; NaN only where `narrow` is needed for it.
static inline Floats rounded_finite(Floats values) {
    Ints odd = SIMD(srli_epi32)(bits(values), 16) & SIMD(set1_epi32)(1);
    Ints sum = SIMD(add_epi32)(bits(values), SIMD(add_epi32)(odd, SIMD(set1_epi32)(0x7fff)));
    return floats(sum & SIMD(set1_epi32)((int)0xffff0000));
}

#ifdef __AVX512BF16__
static inline void store(bf16 *to, Floats values) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values));
}
static inline Floats as_elements(Floats values) { return _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(values)); }
static inline Floats plus_product(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
static inline void store(bf16 *to, Floats values) {
#ifdef __AVX512F__
    Mask nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
#else
    Mask nan = bits(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
#endif
    Floats quiet = floats(SIMD(set1_epi32)(0x7fc00000));
    Ints halves = SIMD(srli_epi32)(bits(chosen(nan, quiet, rounded_finite(values))), 16);
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(halves));
#else
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
#endif
}
static inline Floats as_elements(Floats values) { return values; }
static inline Floats plus_product(Floats sum, Ints a, Ints b) { return fused(floats(a), floats(b), sum); }
#endif

// A VECTOR x VECTOR square of four-byte numbers.
static inline void transpose(Ints x[VECTOR]) {
    Ints y[VECTOR];
    for (size_t i = 0; i < VECTOR; i += 2) {
        y[i] = SIMD(unpacklo_epi32)(x[i], x[i + 1]);
        y[i + 1] = SIMD(unpackhi_epi32)(x[i], x[i + 1]);
    }
    for (size_t i = 0; i < VECTOR; i += 4)
        for (size_t j = 0; j < 2; j++) {
            x[i + 2 * j] = SIMD(unpacklo_epi64)(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = SIMD(unpackhi_epi64)(y[i + j], y[i + 2 + j]);
        }
    for (size_t c = 0; c < 4; c++) {  // Quarter q of x[4 i + c] has column 4 q + c of rows 4 i to 4 i + 3.
#ifdef __AVX512F__
        Ints even = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), odd = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        Ints even2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        Ints odd2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
        y[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        y[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        y[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
#else
        y[c] = _mm256_permute2x128_si256(x[c], x[4 + c], 0x20);
        y[4 + c] = _mm256_permute2x128_si256(x[c], x[4 + c], 0x31);
#endif
    }
    for (size_t i = 0; i < VECTOR; i++) x[i] = y[i];
}

// Numbers 0, 2, 4, ... and 1, 3, 5, ... -> the same in order.
static inline void interleave(Floats x[2]) {
    Floats low = SIMD(unpacklo_ps)(x[0], x[1]), high = SIMD(unpackhi_ps)(x[0], x[1]);
#ifdef __AVX512F__
    Ints first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    x[0] = _mm512_permutex2var_ps(low, first, high);
    x[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high);
#else
    x[0] = _mm256_permute2f128_ps(low, high, 0x20);
    x[1] = _mm256_permute2f128_ps(low, high, 0x31);
#endif
}
