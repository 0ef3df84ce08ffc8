// What all files compute with: bf16 as its bits, powers, and how a function is exported.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

using bf16 = uint16_t;

static inline float widen(float value) { return value; }
static inline float widen(bf16 value) { return __builtin_bit_cast(float, (uint32_t)value << 16); }

// To the nearest, ties to even, NaN stays one.
template <typename T> static inline T narrow(float value);
template <> inline float narrow<float>(float value) { return value; }
template <> inline bf16 narrow<bf16>(float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
template <typename T> static inline float rounded(float value) { return widen(narrow<T>(value)); }

constexpr float TO_INTEGER = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer.

// p 2^n, with n + TO_INTEGER given.
static inline float times_power(float p, float shifted) {
    uint32_t power = __builtin_bit_cast(uint32_t, shifted) - __builtin_bit_cast(uint32_t, TO_INTEGER) + 127;
    return p * __builtin_bit_cast(float, power << 23);
}

// Within 2 ulps; what lies outside of [-87.3, 88.3] is taken to be its bound. (Cephes' polynomial, netlib.org/cephes, expf.c.)
static inline float exponential(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    float shifted = std::fma(x, 1.44269504f, TO_INTEGER);
    float n = shifted - TO_INTEGER;
    float r = std::fma(n, -0.693359375f, x);
    r = std::fma(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = std::fma(p, r, 1.3981999507e-3f);
    p = std::fma(p, r, 8.3334519073e-3f);
    p = std::fma(p, r, 4.1665795894e-2f);
    p = std::fma(p, r, 1.6666665459e-1f);
    p = std::fma(p, r, 5.0000001201e-1f);
    p = std::fma(p * r, r, r + 1.f);
    return times_power(p, shifted);
}

// 2^x within 2 ulps; what lies outside of [-126, 127] is taken to be its bound. (Cephes' polynomial, exp2f.c.)
static inline float power_of_2(float x) {
    x = x < -126.f ? -126.f : x;
    x = x > 127.f ? 127.f : x;
    float shifted = x + TO_INTEGER;
    float r = x - (shifted - TO_INTEGER);
    float p = 1.535336188319500e-4f;
    p = std::fma(p, r, 1.339887440266574e-3f);
    p = std::fma(p, r, 9.618437357674640e-3f);
    p = std::fma(p, r, 5.550332471162809e-2f);
    p = std::fma(p, r, 2.402264791363012e-1f);
    p = std::fma(p, r, 6.931472028550421e-1f);
    p = std::fma(p, r, 1.f);
    return times_power(p, shifted);
}

#define EXPORTED extern "C" __attribute__((visibility("default")))
