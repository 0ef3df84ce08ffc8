// Causal attention by documents in bf16, forward and backward, for processors with AVX512-BF16. attention.py has the
// contract; native.py compiles this file.
//
// A task is a document and a head of keys, with all query heads that share it. Its queries go in blocks of ROWS, and a
// block meets all keys that it may see at once: whole rows of scores, in fp32, stay in the caches. Every product is
// one of `product`, whose operands hold pairs of bf16 along what is summed. Backward takes the heads of a block in
// turn and adds several heads' terms of the keys' and values' gradients by one product. What a task computes depends
// on its document alone, and in its order.
//
// Letters: T tokens, n of a document, H heads of queries, K of keys, G = H / K, E head size, m queries of a block.
// A panel is LANES columns of a right-hand side, row after row.

#include "numbers.h"

#ifdef __AVX512BF16__
#include <cstdlib>
#include <cstring>
#include <memory>

#include "products.h"

constexpr size_t ROWS = 48;  // Whole sixes of `product_of_rows`.
constexpr size_t HEADS = 4;  // Heads of queries whose terms of the gradients of keys and values are one product.

// C (M, N) = A (M, P) B (P, N) of pairs, or += it; N a multiple of VECTOR. From one panel of B to the next: `panel`.
static void product(const Pair *A, size_t lda, const uint32_t *B, size_t panel, float *C, size_t ldc, size_t M, size_t N,
                    size_t P, bool add = false) {
    size_t n = 0;
    for (; n + LANES <= N; n += LANES, B += panel) product_of_rows<4>(A, lda, B, C + n, ldc, M, P, add);
    for (; n + 2 * VECTOR <= N; n += 2 * VECTOR, B += 2 * VECTOR) product_of_rows<2>(A, lda, B, C + n, ldc, M, P, add);
    if (n < N) product_of_rows<1>(A, lda, B, C + n, ldc, M, P, add);
}

// A head of a tensor (T, heads, E), whose rows are `stride` apart.
struct Head {
    const bf16 *rows;
    size_t stride;
    const bf16 *row(size_t token) const { return rows + token * stride; }
    const Pair *pairs(size_t token) const { return (const Pair *)row(token); }
};

static inline __mmask16 lanes_before(size_t end) { return (__mmask16)(end < VECTOR ? (1u << end) - 1 : 0xffff); }

// n rows -> panels of them as columns, pairs along E: (E / 2, n), zeros up to a multiple of VECTOR.
static void pack_columns(Head x, size_t n, size_t E, uint32_t *out) {
    size_t P = E / 2;
    for (size_t k = 0; k < n; k += VECTOR)
        for (size_t p = 0; p < P; p += VECTOR) {
            __m512i square[VECTOR];
            for (size_t i = 0; i < VECTOR; i++)
                square[i] = _mm512_maskz_loadu_epi32(k + i < n ? lanes_before(P - p) : 0, x.pairs(k + i) + p);
            transpose(square);
            uint32_t *to = out + (k / LANES * P + p) * LANES + k % LANES;
            for (size_t i = 0; i < VECTOR && p + i < P; i++) _mm512_storeu_si512(to + i * LANES, square[i]);
        }
}

// Two vectors of bf16 as pairs.
static inline __m512i pairs_of(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

static inline __m256i sixteen(const bf16 *values) { return _mm256_loadu_si256((const __m256i *)values); }

// n rows -> panels of E columns, pairs along the rows: (n / 2, E), zeros up to a multiple of VECTOR rows.
static void pack_rows(Head x, size_t n, size_t E, uint32_t *out) {
    size_t pairs = up(n, VECTOR) / 2;
    for (size_t j = 0; j < pairs; j++)
        for (size_t e = 0; e < E; e += VECTOR) {
            __m256i first = 2 * j < n ? sixteen(x.row(2 * j) + e) : _mm256_setzero_si256();
            __m256i second = 2 * j + 1 < n ? sixteen(x.row(2 * j + 1) + e) : _mm256_setzero_si256();
            _mm512_storeu_si512(out + (e / LANES * pairs + j) * LANES + e % LANES, pairs_of(first, second));
        }
}

// fp32 times a factor -> bf16.
static inline void write(__m512 values, float factor, bf16 *to) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(factor))));
}

// m rows from `start` -> their transpose as a left-hand side, pairs along the rows: (E, HEADS * ROWS / 2), of which
// (m + 1) / 2 are written, with a zero beside an odd last row.
static void transpose(Head x, size_t start, size_t m, size_t E, uint32_t *out) {
    for (size_t j = 0; 2 * j < m; j += VECTOR)
        for (size_t e = 0; e < E; e += VECTOR) {
            __m512i square[VECTOR];
            for (size_t i = 0; i < VECTOR; i++) {
                size_t row = 2 * (j + i);
                __m256i first = row < m ? sixteen(x.row(start + row) + e) : _mm256_setzero_si256();
                square[i] = pairs_of(first, row + 1 < m ? sixteen(x.row(start + row + 1) + e) : _mm256_setzero_si256());
            }
            transpose(square);
            __mmask16 within = lanes_before((m + 1) / 2 - j);
            for (size_t i = 0; i < VECTOR; i++)
                _mm512_mask_storeu_epi32(out + (e + i) * (HEADS * ROWS / 2) + j, within, square[i]);
        }
}

// Queries of a document and the keys that they may see.
struct Block {
    size_t start, m;      // Its queries.
    size_t first, width;  // Its keys: from a panel's first on, so many with those to fill a vector.
    int64_t left;         // So many before its own a query sees; all where it is below 0.
    Block(size_t start, size_t n, int64_t left) : start(start), m(n - start < ROWS ? n - start : ROWS), left(left) {
        first = from(0, 0) / LANES * LANES;
        width = up(start + m - first, VECTOR);
    }
    // Of its query r, the first key that it sees and the one behind the last, counted from `origin`.
    size_t from(size_t r, size_t origin) const {
        int64_t key = (int64_t)(start + r) - left;
        return left < 0 || key < (int64_t)origin ? 0 : (size_t)key - origin;
    }
    size_t to(size_t r) const { return start + r + 1 - first; }
    size_t before() const { return (start - first) / VECTOR * VECTOR; }  // Keys before its own, in whole vectors.
};

// Scores (m, width) = A (m, P) B (P, width), but for vectors of keys behind a query.
static void product_with_keys(const Block &block, const Pair *A, size_t lda, const uint32_t *B, size_t P, float *C,
                              size_t ldc) {
    product(A, lda, B, P * LANES, C, ldc, block.m, block.before(), P);
    for (size_t k = block.before(); k < block.width; k += VECTOR) {
        size_t r = block.first + k > block.start ? block.first + k - block.start : 0;
        const uint32_t *column = B + k / LANES * P * LANES + k % LANES;
        product_of_rows<1>(A + r * lda, lda, column, C + r * ldc + k, ldc, block.m - r, P, false);
    }
}

// C (m, E) = weights (m, width) B (width, E); six rows at a time end at the last key that one of them sees.
static void product_with_weights(const Block &block, const bf16 *weights, size_t ld, const uint32_t *B, size_t panel,
                                 float *C, size_t E) {
    for (size_t r = 0, end; r < block.m; r = end) {
        end = r + 6 < block.m ? r + 6 : block.m;
        const Pair *rows = (const Pair *)(weights + r * ld);
        product(rows, ld / 2, B, panel, C + r * E, E, end - r, E, (block.to(end - 1) + 1) / 2);
    }
}

// The next `count` in memory, on a line of the cache of their own.
template <typename T> static inline T *taken(char *memory, size_t &bytes, size_t count) {
    T *here = memory ? (T *)(memory + bytes) : nullptr;
    bytes += up(count * sizeof(T), 64);
    return here;
}

// Columns of a row of scores. Rows a power of 2 apart would share few lines of a cache.
static inline size_t row_of(size_t n) { return up(n, LANES) + VECTOR; }

// Memory of a thread, for documents of up to n tokens.
struct Scratch {
    uint32_t *keys, *values, *rows;  // Packed: keys and values as columns, and one of them as rows.
    float *scores, *gradients, *of_keys, *of_values, *product;
    bf16 *weights;
    uint32_t *by_query, *gradients_by_query, *turned, *turned_output;

    // Returns the bytes that it takes; with no memory nothing else.
    static size_t carve(Scratch &out, char *memory, size_t n, size_t E, bool backward) {
        size_t bytes = 0, N = row_of(n), packed = up(n, LANES) * up(E, LANES) / 2;
        out.keys = taken<uint32_t>(memory, bytes, packed);
        out.rows = taken<uint32_t>(memory, bytes, packed);
        out.scores = taken<float>(memory, bytes, ROWS * N);
        out.weights = taken<bf16>(memory, bytes, ROWS * N);
        out.product = taken<float>(memory, bytes, ROWS * E);
        if (backward) {
            out.values = taken<uint32_t>(memory, bytes, packed);
            out.gradients = taken<float>(memory, bytes, ROWS * N);
            out.of_keys = taken<float>(memory, bytes, E * N);
            out.of_values = taken<float>(memory, bytes, E * N);
            out.by_query = taken<uint32_t>(memory, bytes, HEADS * ROWS / 2 * N);
            out.gradients_by_query = taken<uint32_t>(memory, bytes, HEADS * ROWS / 2 * N);
            out.turned = taken<uint32_t>(memory, bytes, E * HEADS * ROWS / 2);
            out.turned_output = taken<uint32_t>(memory, bytes, E * HEADS * ROWS / 2);
        }
        return bytes;
    }
};

struct Problem {
    const bf16 *query, *key, *value;
    size_t query_token, query_head, key_token, key_head, value_token, value_head;
    const int64_t *bounds;
    size_t documents, H, K, E;
    float scale;  // Of scores in powers of 2.
    int64_t left;

    Head queries(size_t token, size_t h) const { return {query + token * query_token + h * query_head, query_token}; }
    Head keys(size_t token, size_t h) const { return {key + token * key_token + h * key_head, key_token}; }
    Head values(size_t token, size_t h) const { return {value + token * value_token + h * value_head, value_token}; }
};

// 2^x of 16 numbers within 2^-18, for values that are rounded to bf16; from 2^128 on infinite.
static inline __m512 powers_of_2(__m512 x) {
    constexpr float COEFFICIENTS[] = {5.591786114e-2f, 2.402474483e-1f, 6.931218146e-1f, 9.999992614e-1f};
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // In this order a NaN stays.
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n), p = _mm512_set1_ps(9.570102030e-3f);
    for (float coefficient : COEFFICIENTS) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(p, n);
}

// Scores (m, width) -> weights in bf16, 0 where nothing is seen, and their `sums`, by which the output is divided; `logs`:
// log2 of the sum of 2^(scale score), from which backward makes the weights again.
static void softmax(const Block &block, const float *scores, size_t ld, float scale, bf16 *weights, float *logs, float *sums) {
    __m512 factor = _mm512_set1_ps(scale);
    for (size_t r = 0; r < block.m; r++) {
        const float *row = scores + r * ld;
        bf16 *out = weights + r * ld;
        size_t start = block.from(r, block.first), end = block.to(r);
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        auto each = [&](auto body) __attribute__((always_inline)) {
            size_t k = start;
            for (; k + VECTOR <= end; k += VECTOR) body(k, (__mmask16)0xffff);
            if (k < end) body(k, lanes_before(end - k));
        };
        each([&](size_t k, __mmask16 seen) __attribute__((always_inline)) {
            most = _mm512_mask_max_ps(most, seen, _mm512_maskz_loadu_ps(seen, row + k), most);  // A NaN is passed over.
        });
        float shift = -_mm512_reduce_max_ps(most) * scale;
        memset(out, 0, start * sizeof(bf16));
        each([&](size_t k, __mmask16 seen) __attribute__((always_inline)) {
            __m512 score = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(seen, row + k), factor, _mm512_set1_ps(shift));
            __m256bh weight = _mm512_cvtneps_pbh(powers_of_2(score));
            _mm256_mask_storeu_epi16(out + k, seen, (__m256i)weight);
            sum = _mm512_mask_add_ps(sum, seen, sum, _mm512_cvtpbh_ps(weight));
        });
        memset(out + end, 0, (block.width - end) * sizeof(bf16));
        sums[r] = _mm512_reduce_add_ps(sum);
        logs[r] = std::log2(sums[r]) - shift;
    }
}

// Output (T, H, E), and of each query and head the log2 of its weights' sum (H, T).
static void forward(const Problem &x, Scratch &own, size_t document, size_t h, bf16 *output, float *logs, size_t T) {
    size_t start = (size_t)x.bounds[document], n = (size_t)x.bounds[document + 1] - start, E = x.E, G = x.H / x.K;
    size_t ld = row_of(n), pairs = up(n, VECTOR) / 2;
    pack_columns(x.keys(start, h), n, E, own.keys);
    pack_rows(x.values(start, h), n, E, own.rows);
    for (size_t g = h * G; g < (h + 1) * G; g++) {
        Head queries = x.queries(start, g);
        for (size_t q = 0; q < n; q += ROWS) {
            Block block(q, n, x.left);
            float sums[ROWS];
            product_with_keys(block, queries.pairs(q), queries.stride / 2, own.keys + block.first * E / 2, E / 2,
                              own.scores, ld);
            softmax(block, own.scores, ld, x.scale, own.weights, logs + g * T + start + q, sums);
            product_with_weights(block, own.weights, ld, own.rows + block.first / 2 * LANES, pairs * LANES,
                                 own.product, E);
            for (size_t r = 0; r < block.m; r++) {
                bf16 *row = output + ((start + q + r) * x.H + g) * E;
                for (size_t e = 0; e < E; e += VECTOR)
                    write(_mm512_loadu_ps(own.product + r * E + e), 1.f / sums[r], row + e);
            }
        }
    }
}

// Two rows of scores (2, width) and of gradients d of their weights -> panels of keys, `panel` apart, of pairs along the
// queries: the weights w, 0 where nothing is seen, and the gradients of the scores (but for ln 2), which also go to
// `out` by row: w (d - D), with D the mean of d by w. A token that takes nearly all the weight is left with what d - D
// cancels to, so D is found twice: its fp32, and what that has lost. `whole`: there is a second row.
static void softmax_backward(const Block &block, size_t r, bool whole, const float *scores, const float *d, size_t ld,
                             float scale, const float *logs, bf16 *out, uint32_t *of_weights, uint32_t *of_gradients,
                             size_t panel) {
    size_t starts[] = {block.from(r, block.first), block.from(r + whole, block.first)};
    size_t ends[] = {block.to(r), whole ? block.to(r + 1) : 0}, start = starts[0] / VECTOR * VECTOR;
    size_t end = up(block.to(r + whole), VECTOR);
    auto place = [=](size_t k) { return k / LANES * panel + k % LANES; };
    auto seen = [&](size_t i, size_t k) {
        __mmask16 before = starts[i] > k ? lanes_before(starts[i] - k) : 0;
        return ends[i] > k ? (__mmask16)(lanes_before(ends[i] - k) & ~before) : (__mmask16)0;
    };
    auto each = [&](auto body) __attribute__((always_inline)) {
        for (size_t k = start; k < end; k += VECTOR)
            if (whole && k >= starts[1] && k + VECTOR <= ends[0]) body(k, (__mmask16)0xffff, (__mmask16)0xffff);
            else body(k, seen(0, k), seen(1, k));
    };
    auto unpack = [&](size_t k, __m512 w[2]) __attribute__((always_inline)) {
        __m512i both = _mm512_loadu_si512(of_weights + place(k));
        w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        w[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    };
    __m512 factor = _mm512_set1_ps(scale), shifts[] = {_mm512_set1_ps(-logs[r]), _mm512_set1_ps(-logs[r + whole])};
    __m512 sums[2] = {}, totals[2] = {}, rests[2] = {}, means[2], rest[2];
    float total[2];
    each([&](size_t k, __mmask16 first, __mmask16 second) __attribute__((always_inline)) {
        __m512 w[2];
        __mmask16 masks[] = {first, second};
        __m256i weights[2];
        for (size_t i = 0; i < 2; i++) {
            __m512 score = _mm512_maskz_loadu_ps(masks[i], scores + i * ld + k);
            __m512 power = powers_of_2(_mm512_fmadd_ps(score, factor, shifts[i]));
            weights[i] = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(masks[i], power));
        }
        _mm512_storeu_si512(of_weights + place(k), pairs_of(weights[0], weights[1]));
        unpack(k, w);
        for (size_t i = 0; i < 2; i++) {
            sums[i] = _mm512_fmadd_ps(w[i], _mm512_maskz_loadu_ps(masks[i], d + i * ld + k), sums[i]);
            totals[i] = _mm512_add_ps(totals[i], w[i]);
        }
    });
    for (size_t i = 0; i < 2; i++) {
        total[i] = i && !whole ? 1.f : _mm512_reduce_add_ps(totals[i]);
        means[i] = _mm512_set1_ps(_mm512_reduce_add_ps(sums[i]) / total[i]);
    }
    each([&](size_t k, __mmask16 first, __mmask16 second) __attribute__((always_inline)) {
        __m512 w[2];
        __mmask16 masks[] = {first, second};
        unpack(k, w);
        for (size_t i = 0; i < 2; i++) {
            __m512 less = _mm512_sub_ps(_mm512_maskz_loadu_ps(masks[i], d + i * ld + k), means[i]);
            rests[i] = _mm512_fmadd_ps(w[i], less, rests[i]);
        }
    });
    for (size_t i = 0; i < 2; i++) rest[i] = _mm512_set1_ps(_mm512_reduce_add_ps(rests[i]) / total[i]);
    each([&](size_t k, __mmask16 first, __mmask16 second) __attribute__((always_inline)) {
        __m512 w[2];
        __mmask16 masks[] = {first, second};
        __m256i gradients[2];
        unpack(k, w);
        for (size_t i = 0; i < 2; i++) {
            __m512 less = _mm512_sub_ps(_mm512_maskz_loadu_ps(masks[i], d + i * ld + k), means[i]);
            gradients[i] = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(w[i], _mm512_sub_ps(less, rest[i])));
            _mm256_storeu_si256((__m256i *)(out + i * ld + k), gradients[i]);
        }
        _mm512_storeu_si512(of_gradients + place(k), pairs_of(gradients[0], gradients[1]));
    });
    auto clear = [&](size_t k, size_t to) {
        for (; k < to; k += VECTOR) {
            _mm512_storeu_si512(of_weights + place(k), _mm512_setzero_si512());
            _mm512_storeu_si512(of_gradients + place(k), _mm512_setzero_si512());
            for (size_t i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)(out + i * ld + k), _mm256_setzero_si256());
        }
    };
    clear(0, start);  // What neither sees.
    clear(end, block.width);
}

// (E, n) in fp32 times a factor -> n rows of bf16, `stride` apart.
static void write_rows(const float *from, size_t ld, size_t n, size_t E, float factor, bf16 *to, size_t stride) {
    for (size_t k = 0; k < n; k += VECTOR)
        for (size_t e = 0; e < E; e += VECTOR) {
            __m512i square[VECTOR];
            for (size_t i = 0; i < VECTOR; i++) square[i] = _mm512_loadu_si512(from + (e + i) * ld + k);
            transpose(square);
            for (size_t i = 0; i < VECTOR && k + i < n; i++)
                write(_mm512_castsi512_ps(square[i]), factor, to + (k + i) * stride + e);
        }
}

static void backward(const Problem &x, Scratch &own, size_t document, size_t h, const bf16 *d_output, const float *logs,
                     bf16 *d_query, bf16 *d_key, bf16 *d_value, size_t T) {
    size_t start = (size_t)x.bounds[document], n = (size_t)x.bounds[document + 1] - start, E = x.E, G = x.H / x.K;
    size_t ld = row_of(n), pairs = up(n, VECTOR) / 2, by_query = HEADS * ROWS / 2 * LANES;
    float plain = x.scale * 0.6931471805599453f;
    pack_columns(x.keys(start, h), n, E, own.keys);
    pack_columns(x.values(start, h), n, E, own.values);
    pack_rows(x.keys(start, h), n, E, own.rows);
    memset(own.of_keys, 0, E * ld * sizeof(float));
    memset(own.of_values, 0, E * ld * sizeof(float));
    for (size_t q = 0; q < n; q += ROWS) {
        Block block(q, n, x.left);
        size_t m = block.m, half = (m + 1) / 2;
        for (size_t g = 0; g < G; g++) {
            size_t head = h * G + g, place = g % HEADS * half;
            Head queries = x.queries(start, head), outputs = {d_output + (start * x.H + head) * E, x.H * E};
            product_with_keys(block, queries.pairs(q), queries.stride / 2, own.keys + block.first * E / 2, E / 2,
                              own.scores, ld);
            product_with_keys(block, outputs.pairs(q), outputs.stride / 2, own.values + block.first * E / 2, E / 2,
                              own.gradients, ld);
            for (size_t r = 0; r < m; r += 2)
                softmax_backward(block, r, r + 1 < m, own.scores + r * ld, own.gradients + r * ld, ld, x.scale,
                                 logs + head * T + start + q, own.weights + r * ld,
                                 own.by_query + (place + r / 2) * LANES,
                                 own.gradients_by_query + (place + r / 2) * LANES, by_query);
            product_with_weights(block, own.weights, ld, own.rows + block.first / 2 * LANES, pairs * LANES,
                                 own.product, E);
            for (size_t r = 0; r < m; r++) {
                bf16 *row = d_query + ((start + q + r) * x.H + head) * E;
                for (size_t e = 0; e < E; e += VECTOR) write(_mm512_loadu_ps(own.product + r * E + e), plain, row + e);
            }
            transpose(outputs, q, m, E, own.turned_output + place);
            transpose(queries, q, m, E, own.turned + place);
            if (g % HEADS + 1 < HEADS && g + 1 < G) continue;
            product((const Pair *)own.turned_output, HEADS * ROWS / 2, own.by_query, by_query,
                    own.of_values + block.first, ld, E, block.width, place + half, true);
            product((const Pair *)own.turned, HEADS * ROWS / 2, own.gradients_by_query, by_query,
                    own.of_keys + block.first, ld, E, block.width, place + half, true);
        }
    }
    write_rows(own.of_keys, ld, n, E, plain, d_key + (start * x.K + h) * E, x.K * E);
    write_rows(own.of_values, ld, n, E, 1.f, d_value + (start * x.K + h) * E, x.K * E);
}

// Every document and head of keys by itself. Returns whether there was memory.
template <typename Task> static int each(const Problem &x, bool backwards, Task task) {
    size_t longest = 0;
    for (size_t d = 0; d < x.documents; d++) {
        size_t n = (size_t)(x.bounds[d + 1] - x.bounds[d]);
        longest = n > longest ? n : longest;
    }
    Scratch measured{};
    size_t bytes = Scratch::carve(measured, nullptr, longest, x.E, backwards);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        std::unique_ptr<char, void (*)(void *)> memory((char *)std::aligned_alloc(64, up(bytes, 64)), std::free);
        failed = memory == nullptr;
        Scratch own{};
        if (!failed) Scratch::carve(own, memory.get(), longest, x.E, backwards);
#pragma omp for schedule(dynamic)
        for (size_t number = 0; number < x.documents * x.K; number++)
            if (!failed && x.bounds[number / x.K + 1] > x.bounds[number / x.K]) task(own, number / x.K, number % x.K);
    }
    return !failed;
}

#define PROBLEM                                                                                                        \
    const bf16 *query, const bf16 *key, const bf16 *value, size_t query_token, size_t query_head, size_t key_token,    \
        size_t key_head, size_t value_token, size_t value_head, const int64_t *bounds, size_t documents, size_t H,     \
        size_t K, size_t E, float scale, int64_t left
#define THE_PROBLEM                                                                                                    \
    {query, key, value, query_token, query_head, key_token, key_head, value_token, value_head, bounds, documents, H,   \
     K,     E,   scale, left}

EXPORTED int attends() { return 1; }

EXPORTED int attention_forward_bf16(PROBLEM, bf16 *output, float *logs, size_t T) {
    Problem x = THE_PROBLEM;
    return each(x, false, [&](Scratch &own, size_t document, size_t h) { forward(x, own, document, h, output, logs, T); });
}

EXPORTED int attention_backward_bf16(PROBLEM, const bf16 *d_output, const float *logs, bf16 *d_query, bf16 *d_key,
                                     bf16 *d_value, size_t T) {
    Problem x = THE_PROBLEM;
    return each(x, true, [&](Scratch &own, size_t document, size_t h) {
        backward(x, own, document, h, d_output, logs, d_query, d_key, d_value, T);
    });
}
#else
EXPORTED int attends() { return 0; }
#endif
