// Causal attention by documents in bf16, forward and backward, for processors with AVX512-BF16. attention.py has the
// contract; native.py compiles this file.
//
// A task is a document and a head of keys, with all query heads that share it. Its queries go in blocks of ROWS, and a
// block meets all keys that it may see at once: whole rows of scores, in fp32, stay in the caches. Every product is
// one of `product`, whose operands hold pairs of bf16 along what is summed. What a task computes depends on its
// document alone, and in its order.
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

// n rows -> panels of them as columns, pairs along E: (E / 2, n), zeros up to a multiple of VECTOR.
static void pack_columns(Head x, size_t n, size_t E, uint32_t *out) {
    size_t P = E / 2;
    for (size_t k = 0; k < up(n, VECTOR); k++) {
        uint32_t *column = out + k / LANES * P * LANES + k % LANES;
        for (size_t p = 0; p < P; p++) column[p * LANES] = k < n ? x.pairs(k)[p] : 0;
    }
}

static inline uint32_t pair(bf16 first, bf16 second) { return (uint32_t)first | (uint32_t)second << 16; }

// n rows -> panels of E columns, pairs along the rows: (n / 2, E), zeros up to a multiple of VECTOR rows.
static void pack_rows(Head x, size_t n, size_t E, uint32_t *out) {
    size_t pairs = up(n, VECTOR) / 2;
    for (size_t j = 0; j < pairs; j++) {
        const bf16 *first = x.row(2 * j), *second = x.row(2 * j + 1);
        for (size_t e = 0; e < E; e++) {
            bf16 low = 2 * j < n ? first[e] : 0, high = 2 * j + 1 < n ? second[e] : 0;
            out[(e / LANES * pairs + j) * LANES + e % LANES] = pair(low, high);
        }
    }
}

// Two vectors of bf16 as pairs.
static inline __m512i pairs_of(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

static inline __m256i sixteen(const bf16 *values) { return _mm256_loadu_si256((const __m256i *)values); }

static inline __mmask16 lanes_before(size_t end) { return (__mmask16)(end < VECTOR ? (1u << end) - 1 : 0xffff); }

// m rows from `start` -> their transpose as a left-hand side, pairs along the rows: (E, ROWS / 2), of which (m + 1) / 2
// are written, with a zero beside an odd last row.
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
            for (size_t i = 0; i < VECTOR; i++)
                _mm512_mask_storeu_epi32(out + (e + i) * (ROWS / 2) + j, lanes_before(ROWS / 2 - j), square[i]);
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
};

// The next `count` in memory, on a line of the cache of their own.
template <typename T> static inline T *taken(char *memory, size_t &bytes, size_t count) {
    T *here = memory ? (T *)(memory + bytes) : nullptr;
    bytes += up(count * sizeof(T), 64);
    return here;
}

// Memory of a thread, for documents of up to n tokens.
struct Scratch {
    uint32_t *keys, *values, *rows;  // Packed: keys and values as columns, and one of them as rows.
    float *scores, *gradients, *of_keys, *of_values, *product;
    bf16 *weights;
    uint32_t *by_query, *gradients_by_query, *turned, *turned_output;

    // Returns the bytes that it takes; with no memory nothing else.
    static size_t carve(Scratch &out, char *memory, size_t n, size_t E, bool backward) {
        size_t bytes = 0, N = up(n, LANES), packed = N * up(E, LANES) / 2;
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
            out.by_query = taken<uint32_t>(memory, bytes, ROWS / 2 * N);
            out.gradients_by_query = taken<uint32_t>(memory, bytes, ROWS / 2 * N);
            out.turned = taken<uint32_t>(memory, bytes, E * ROWS / 2);
            out.turned_output = taken<uint32_t>(memory, bytes, E * ROWS / 2);
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

// 2^x as in numbers.h, of 16 numbers; from 2^128 on infinite.
static inline __m512 powers_of_2(__m512 x) {
    constexpr float COEFFICIENTS[] = {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                                      2.402264791363012e-1f, 6.931472028550421e-1f, 1.f};
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // In this order a NaN stays.
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n), p = _mm512_set1_ps(1.535336188319500e-4f);
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
        for (size_t k = start; k < end; k += VECTOR) {
            __mmask16 seen = lanes_before(end - k);
            most = _mm512_mask_max_ps(most, seen, _mm512_maskz_loadu_ps(seen, row + k), most);  // A NaN is passed over.
        }
        float shift = -_mm512_reduce_max_ps(most) * scale;
        memset(out, 0, start * sizeof(bf16));
        for (size_t k = start; k < end; k += VECTOR) {
            __mmask16 seen = lanes_before(end - k);
            __m512 power = powers_of_2(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(seen, row + k), factor, _mm512_set1_ps(shift)));
            __m256bh weight = _mm512_cvtneps_pbh(power);
            _mm256_mask_storeu_epi16(out + k, seen, (__m256i)weight);
            sum = _mm512_mask_add_ps(sum, seen, sum, _mm512_cvtpbh_ps(weight));
        }
        memset(out + end, 0, (block.width - end) * sizeof(bf16));
        sums[r] = _mm512_reduce_add_ps(sum);
        logs[r] = std::log2(sums[r]) - shift;
    }
}

// Output (T, H, E), and of each query and head the log2 of its weights' sum (H, T).
static void forward(const Problem &x, Scratch &own, size_t document, size_t h, bf16 *output, float *logs, size_t T) {
    size_t start = (size_t)x.bounds[document], n = (size_t)x.bounds[document + 1] - start, E = x.E, G = x.H / x.K;
    size_t ld = up(n, LANES), pairs = up(n, VECTOR) / 2;
    pack_columns(x.keys(start, h), n, E, own.keys);
    pack_rows(x.values(start, h), n, E, own.rows);
    for (size_t g = h * G; g < (h + 1) * G; g++) {
        Head queries = x.queries(start, g);
        for (size_t q = 0; q < n; q += ROWS) {
            Block block(q, n, x.left);
            float sums[ROWS];
            product(queries.pairs(q), queries.stride / 2, own.keys + block.first * E / 2, E / 2 * LANES, own.scores, ld,
                    block.m, block.width, E / 2);
            softmax(block, own.scores, ld, x.scale, own.weights, logs + g * T + start + q, sums);
            product((const Pair *)own.weights, ld / 2, own.rows + block.first / 2 * LANES, pairs * LANES, own.product, E,
                    block.m, E, block.width / 2);
            for (size_t r = 0; r < block.m; r++) {
                bf16 *row = output + ((start + q + r) * x.H + g) * E;
                float inverse = 1.f / sums[r];
                for (size_t e = 0; e < E; e++) row[e] = narrow<bf16>(own.product[r * E + e] * inverse);
            }
        }
    }
}

// Scores become the weights w, rounded, and 0 where nothing is seen; `out`, bf16, the gradients of the scores (but for
// ln 2): w (d - D), with d those of the weights and D their mean by w. A token that takes nearly all the weight is left
// with what d - D cancels to, so D is found twice: its fp32, and what that has lost.
static void softmax_backward(const Block &block, float *scores, float *d, size_t ld, float scale, const float *logs,
                             bf16 *out) {
    for (size_t r = 0; r < block.m; r++) {
        float *w = scores + r * ld, *dr = d + r * ld;
        bf16 *of_row = out + r * ld;
        size_t start = block.from(r, block.first), end = block.to(r);
        __m512 shift = _mm512_set1_ps(-logs[r]), factor = _mm512_set1_ps(scale);
        __m512 sums = _mm512_setzero_ps(), totals = _mm512_setzero_ps(), rests = _mm512_setzero_ps();
        memset(w, 0, start * sizeof(float));
        memset(of_row, 0, start * sizeof(bf16));
        for (size_t k = start; k < end; k += VECTOR) {
            __mmask16 seen = lanes_before(end - k);
            __m512 power = powers_of_2(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(seen, w + k), factor, shift));
            __m512 weight = _mm512_maskz_mov_ps(seen, _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(power)));
            _mm512_mask_storeu_ps(w + k, seen, weight);
            sums = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(seen, dr + k), sums);
            totals = _mm512_add_ps(totals, weight);
        }
        float total = _mm512_reduce_add_ps(totals);
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sums) / total);
        for (size_t k = start; k < end; k += VECTOR) {
            __mmask16 seen = lanes_before(end - k);
            __m512 less = _mm512_sub_ps(_mm512_maskz_loadu_ps(seen, dr + k), mean);
            _mm512_mask_storeu_ps(dr + k, seen, less);
            rests = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(seen, w + k), less, rests);
        }
        __m512 rest = _mm512_set1_ps(_mm512_reduce_add_ps(rests) / total);
        for (size_t k = start; k < end; k += VECTOR) {
            __mmask16 seen = lanes_before(end - k);
            __m512 less = _mm512_sub_ps(_mm512_maskz_loadu_ps(seen, dr + k), rest);
            __m256bh gradient = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_maskz_loadu_ps(seen, w + k), less));
            _mm256_mask_storeu_epi16(of_row + k, seen, (__m256i)gradient);
        }
        memset(w + end, 0, (block.width - end) * sizeof(float));
        memset(of_row + end, 0, (block.width - end) * sizeof(bf16));
    }
}

// (m, width) -> panels of keys, pairs along the queries: of weights, rounded, in fp32 and of gradients in bf16.
static void pack_by_query(const Block &block, const float *weights, const bf16 *gradients, size_t ld, uint32_t *of_weights,
                          uint32_t *of_gradients) {
    for (size_t j = 0; 2 * j < block.m; j++) {
        bool whole = 2 * j + 1 < block.m;
        const float *w = weights + 2 * j * ld, *w2 = w + ld;
        const bf16 *d = gradients + 2 * j * ld, *d2 = d + ld;
        for (size_t k = 0; k < block.width; k += VECTOR) {
            size_t to = (k / LANES * (ROWS / 2) + j) * LANES + k % LANES;
            __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(w + k), 16), high = _mm512_setzero_si512();
            if (whole) high = _mm512_and_si512(_mm512_loadu_si512(w2 + k), _mm512_set1_epi32((int)0xffff0000));
            _mm512_storeu_si512(of_weights + to, _mm512_or_si512(low, high));
            __m256i second = whole ? sixteen(d2 + k) : _mm256_setzero_si256();
            _mm512_storeu_si512(of_gradients + to, pairs_of(sixteen(d + k), second));
        }
    }
}

static void backward(const Problem &x, Scratch &own, size_t document, size_t h, const bf16 *d_output, const float *logs,
                     bf16 *d_query, bf16 *d_key, bf16 *d_value, size_t T) {
    size_t start = (size_t)x.bounds[document], n = (size_t)x.bounds[document + 1] - start, E = x.E, G = x.H / x.K;
    size_t ld = up(n, LANES), pairs = up(n, VECTOR) / 2;
    float plain = x.scale * 0.6931471805599453f;
    pack_columns(x.keys(start, h), n, E, own.keys);
    pack_columns(x.values(start, h), n, E, own.values);
    pack_rows(x.keys(start, h), n, E, own.rows);
    memset(own.of_keys, 0, E * ld * sizeof(float));
    memset(own.of_values, 0, E * ld * sizeof(float));
    for (size_t g = h * G; g < (h + 1) * G; g++) {
        Head queries = x.queries(start, g), outputs = {d_output + (start * x.H + g) * E, x.H * E};
        for (size_t q = 0; q < n; q += ROWS) {
            Block block(q, n, x.left);
            size_t m = block.m, panel = E / 2 * LANES, by_query = ROWS / 2 * LANES;
            product(queries.pairs(q), queries.stride / 2, own.keys + block.first * E / 2, panel, own.scores, ld, m,
                    block.width, E / 2);
            product(outputs.pairs(q), outputs.stride / 2, own.values + block.first * E / 2, panel, own.gradients, ld, m,
                    block.width, E / 2);
            softmax_backward(block, own.scores, own.gradients, ld, x.scale, logs + g * T + start + q, own.weights);
            product((const Pair *)own.weights, ld / 2, own.rows + block.first / 2 * LANES, pairs * LANES, own.product, E,
                    m, E, block.width / 2);
            for (size_t r = 0; r < m; r++) {
                bf16 *row = d_query + ((start + q + r) * x.H + g) * E;
                for (size_t e = 0; e < E; e++) row[e] = narrow<bf16>(own.product[r * E + e] * plain);
            }
            pack_by_query(block, own.scores, own.weights, ld, own.by_query, own.gradients_by_query);
            transpose(outputs, q, m, E, own.turned_output);
            transpose(queries, q, m, E, own.turned);
            product((const Pair *)own.turned_output, ROWS / 2, own.by_query, by_query, own.of_values + block.first, ld, E, block.width,
                    (m + 1) / 2, true);
            product((const Pair *)own.turned, ROWS / 2, own.gradients_by_query, by_query, own.of_keys + block.first, ld, E, block.width,
                    (m + 1) / 2, true);
        }
    }
    for (size_t k = 0; k < n; k++) {
        size_t row = ((start + k) * x.K + h) * E;
        for (size_t e = 0; e < E; e++) {
            d_key[row + e] = narrow<bf16>(own.of_keys[e * ld + k] * plain);
            d_value[row + e] = narrow<bf16>(own.of_values[e * ld + k]);
        }
    }
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
