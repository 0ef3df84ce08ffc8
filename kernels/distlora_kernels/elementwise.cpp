// The elementwise operations of a decoder block and the loss of its logits, each in one pass over what it reads.
// elementwise.py has the contracts; native.py compiles this file for the machine that it runs on, where a run asks.
//
// Sums are fp32 and in one row, whose order is the compiled code's: no result depends on how many rows there are, nor
// on the threads that share them. Values are rounded to T wherever transformers' modules round them, so what differs
// from those is the order of a norm's sum and the last bit of exp.
//
// Letters: M rows, N columns, T the dtype (bf16 as its bits, or float).

#include "numbers.h"

constexpr size_t FEWEST = 1 << 15;  // Numbers for which other threads are woken.

static inline float tanh_of(float x) { return 1.f - 2.f / (exponential(2.f * x) + 1.f); }

struct Silu {
    static inline float value(float x) { return x / (1.f + exponential(-x)); }
    static inline float slope(float x) {
        float s = 1.f / (1.f + exponential(-x));
        return s * (1.f + x * (1.f - s));
    }
};

// The tanh approximation.
struct Gelu {
    static constexpr float BETA = 0.7978845608f, KAPPA = 0.044715f;
    static inline float value(float x) { return 0.5f * x * (1.f + tanh_of(BETA * (x + KAPPA * x * x * x))); }
    static inline float slope(float x) {
        float t = tanh_of(BETA * (x + KAPPA * x * x * x));
        return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * BETA * (1.f + 3.f * KAPPA * x * x);
    }
};

// y = w * T(x / rms(x)), or with `plus_one` T(x / rms(x) * (1 + w)); inverse (M,): 1 / rms(x).
template <typename T, bool plus_one>
static void norm_forward(const T *x, const T *w, T *y, float *inverse, size_t M, size_t N, float eps) {
#pragma omp parallel for if (M * N > FEWEST)
    for (size_t m = 0; m < M; m++) {
        const T *xm = x + m * N;
        T *ym = y + m * N;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t n = 0; n < N; n++) sum += widen(xm[n]) * widen(xm[n]);
        float r = 1.f / std::sqrt(sum / (float)N + eps);
        inverse[m] = r;
#pragma omp simd
        for (size_t n = 0; n < N; n++) {
            float normal = widen(xm[n]) * r;
            ym[n] = plus_one ? narrow<T>(normal * (1.f + widen(w[n]))) : narrow<T>(widen(w[n]) * rounded<T>(normal));
        }
    }
}

template <typename T, bool plus_one>
static void norm_backward(const T *dy, const T *x, const T *w, const float *inverse, T *dx, size_t M, size_t N) {
#pragma omp parallel for if (M * N > FEWEST)
    for (size_t m = 0; m < M; m++) {
        const T *dm = dy + m * N, *xm = x + m * N;
        T *out = dx + m * N;
        float r = inverse[m], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t n = 0; n < N; n++) {
            float g = plus_one ? widen(dm[n]) * (1.f + widen(w[n])) : rounded<T>(widen(dm[n]) * widen(w[n]));
            sum += g * widen(xm[n]);
        }
        float shift = sum * r * r * r / (float)N;
#pragma omp simd
        for (size_t n = 0; n < N; n++) {
            float g = plus_one ? widen(dm[n]) * (1.f + widen(w[n])) : rounded<T>(widen(dm[n]) * widen(w[n]));
            out[n] = narrow<T>(g * r - widen(xm[n]) * shift);
        }
    }
}

// y = T(act(gate)) * up; rows of gate and up are `stride` apart.
template <typename T, typename Act>
static void gate_forward(const T *gate, const T *up, T *y, size_t M, size_t N, size_t stride) {
#pragma omp parallel for if (M * N > FEWEST)
    for (size_t m = 0; m < M; m++) {
        const T *g = gate + m * stride, *u = up + m * stride;
        T *out = y + m * N;
#pragma omp simd
        for (size_t n = 0; n < N; n++) out[n] = narrow<T>(rounded<T>(Act::value(widen(g[n]))) * widen(u[n]));
    }
}

// The gradients of gate and up are written over them.
template <typename T, typename Act>
static void gate_backward(const T *dy, T *gate, T *up, size_t M, size_t N, size_t stride) {
#pragma omp parallel for if (M * N > FEWEST)
    for (size_t m = 0; m < M; m++) {
        const T *d = dy + m * N;
        T *g = gate + m * stride, *u = up + m * stride;
#pragma omp simd
        for (size_t n = 0; n < N; n++) {
            float dm = widen(d[n]), gm = widen(g[n]), um = widen(u[n]);
            u[n] = narrow<T>(dm * rounded<T>(Act::value(gm)));
            g[n] = narrow<T>(rounded<T>(dm * um) * Act::slope(gm));
        }
    }
}

// The first `turned` columns of x (B, H, S, ...), in place; cos and sin (B or 1, S, turned). `back`: the transpose.
template <typename T, bool back>
static void rotate(T *x, const T *cosines, const T *sines, size_t B, size_t H, size_t S, size_t turned, size_t of_batch,
                   size_t of_head, size_t of_token, size_t table_of_batch) {
    size_t half = turned / 2;
#pragma omp parallel for collapse(2) if (B * H * S * turned > FEWEST)
    for (size_t b = 0; b < B; b++)
        for (size_t s = 0; s < S; s++) {
            const T *c = cosines + b * table_of_batch + s * turned, *d = sines + b * table_of_batch + s * turned;
            for (size_t h = 0; h < H; h++) {
                T *low = x + b * of_batch + h * of_head + s * of_token, *high = low + half;
#pragma omp simd
                for (size_t i = 0; i < half; i++) {
                    float first = widen(low[i]), second = widen(high[i]);
                    float of_low = back ? second * widen(d[half + i]) : -second * widen(d[i]);
                    float of_high = back ? -first * widen(d[i]) : first * widen(d[half + i]);
                    low[i] = narrow<T>(rounded<T>(first * widen(c[i])) + rounded<T>(of_low));
                    high[i] = narrow<T>(rounded<T>(second * widen(c[half + i])) + rounded<T>(of_high));
                }
            }
        }
}

// losses (M,): -log softmax(logits)[label], and over the logits its gradient; both 0 where the label is below 0, and NaN
// where it is none of the N.
template <typename T>
static void cross_entropy(T *logits, const int64_t *labels, float *losses, size_t M, size_t N) {
#pragma omp parallel for if (M * N > FEWEST)
    for (size_t m = 0; m < M; m++) {
        T *row = logits + m * N;
        int64_t label = labels[m];
        if (label < 0 || (uint64_t)label >= N) {
            losses[m] = label < 0 ? 0.f : NAN;
            for (size_t n = 0; n < N; n++) row[n] = narrow<T>(losses[m]);
            continue;
        }
        float most = widen(row[0]), sum = 0;
#pragma omp simd reduction(max : most)
        for (size_t n = 0; n < N; n++) most = widen(row[n]) > most ? widen(row[n]) : most;
#pragma omp simd reduction(+ : sum)
        for (size_t n = 0; n < N; n++) sum += exponential(widen(row[n]) - most);
        float log_sum = std::log(sum);
        float of_label = widen(row[label]) - most - log_sum;
        losses[m] = -of_label;
#pragma omp simd
        for (size_t n = 0; n < N; n++) row[n] = narrow<T>(exponential(widen(row[n]) - most - log_sum));
        row[label] = narrow<T>(exponential(of_label) - 1.f);
    }
}

#define WITH(T, NAME)                                                                                                  \
    EXPORTED void norm_forward_##NAME(const T *x, const T *w, T *y, float *inverse, size_t M, size_t N, float eps,     \
                                      int plus_one) {                                                                  \
        (plus_one ? norm_forward<T, true> : norm_forward<T, false>)(x, w, y, inverse, M, N, eps);                      \
    }                                                                                                                  \
    EXPORTED void norm_backward_##NAME(const T *dy, const T *x, const T *w, const float *inverse, T *dx, size_t M,     \
                                       size_t N, int plus_one) {                                                       \
        (plus_one ? norm_backward<T, true> : norm_backward<T, false>)(dy, x, w, inverse, dx, M, N);                    \
    }                                                                                                                  \
    EXPORTED void gate_forward_##NAME(const T *gate, const T *up, T *y, size_t M, size_t N, size_t stride, int gelu) { \
        (gelu ? gate_forward<T, Gelu> : gate_forward<T, Silu>)(gate, up, y, M, N, stride);                             \
    }                                                                                                                  \
    EXPORTED void gate_backward_##NAME(const T *dy, T *gate, T *up, size_t M, size_t N, size_t stride, int gelu) {     \
        (gelu ? gate_backward<T, Gelu> : gate_backward<T, Silu>)(dy, gate, up, M, N, stride);                          \
    }                                                                                                                  \
    EXPORTED void rotate_##NAME(T *x, const T *c, const T *s, size_t B, size_t H, size_t S, size_t turned,             \
                                size_t of_batch, size_t of_head, size_t of_token, size_t table_of_batch, int back) {   \
        (back ? rotate<T, true> : rotate<T, false>)(x, c, s, B, H, S, turned, of_batch, of_head, of_token,             \
                                                    table_of_batch);                                                   \
    }                                                                                                                  \
    EXPORTED void cross_entropy_##NAME(T *logits, const int64_t *labels, float *losses, size_t M, size_t N) {          \
        cross_entropy<T>(logits, labels, losses, M, N);                                                                \
    }

WITH(bf16, bf16)
WITH(float, fp32)
