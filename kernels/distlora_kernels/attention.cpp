// Causal attention by documents in bf16, forward and backward. attention.py has the contract; native.py compiles this file.
//
// A task is a document and a head of keys, with all query heads that share it. Its queries go in blocks of ROWS, and a
// block meets all keys that it may see at once: whole rows of scores, in fp32, stay in the caches. Every product is
// one of `product`, whose operands are cells along what is summed. Backward takes the heads of a block in turn and adds
// several heads' terms of the keys' and values' gradients by one product. What a task computes depends on its document
// alone, and in its order.
//
// Letters: T tokens, n of a document, H heads of queries, K of keys, G = H / K, E head size, m queries of a block.

#include "numbers.h"

#ifdef VECTORS
#include <cstdlib>
#include <cstring>
#include <memory>

#include "products.h"

constexpr size_t ROWS = 48;                     // Whole sixes of `product_of_rows`.
constexpr size_t HEADS = 4;                     // Heads whose terms of the gradients of keys and values are one product.
constexpr size_t TURNED = HEADS * ROWS / DEEP;  // Cells along the queries of those heads.

// C (M, N) = A (M, P) B (P, N) of cells, or += it; N a multiple of VECTOR. From one panel of B to the next: `panel`.
static void product(const Cell *A, size_t lda, const Cell *B, size_t panel, float *C, size_t ldc, size_t M, size_t N,
                    size_t P, bool add = false) {
    size_t n = 0;
    for (; n + LANES <= N; n += LANES, B += panel) product_of_rows<WIDE>(A, lda, B, LANES, C + n, ldc, M, P, add);
    for (; n + 2 * VECTOR <= N; n += 2 * VECTOR, B += 2 * VECTOR) product_of_rows<2>(A, lda, B, LANES, C + n, ldc, M, P, add);
    if (n < N) product_of_rows<1>(A, lda, B, LANES, C + n, ldc, M, P, add);
}

// A head of a tensor (T, heads, E), whose rows are `stride` apart.
struct Head {
    const bf16 *rows;
    size_t stride;
    const bf16 *row(size_t token) const { return rows + token * stride; }
};

// VECTOR cells along E of a row, from cell p of P on.
static inline Ints cells_of_row(const bf16 *row, size_t p, size_t P) {
    if (DEEP == 2) return load_bits(lanes_before(P - p), row + 2 * p);
    return bits(load(row + p));
}

// VECTOR cells along the rows, of DEEP rows from `row` on, from column e on; 0 from row n on.
static inline Ints cells_of_rows(Head x, size_t row, size_t n, size_t e) {
    Floats values[2] = {all(0.f), all(0.f)};
    for (size_t i = 0; i < DEEP; i++)
        if (row + i < n) values[i] = load(x.row(row + i) + e);
    return DEEP == 2 ? pairs_of(values[0], values[1]) : bits(values[0]);
}

// n rows -> panels of them as columns, cells along E: (E cells, n), zeros up to a multiple of VECTOR.
static void pack_columns(Head x, size_t n, size_t E, Cell *out) {
    size_t P = E / DEEP;
    for (size_t k = 0; k < n; k += VECTOR)
        for (size_t p = 0; p < P; p += VECTOR) {
            Ints square[VECTOR];
            for (size_t i = 0; i < VECTOR; i++)
                square[i] = k + i < n ? cells_of_row(x.row(k + i), p, P) : bits(all(0.f));
            transpose(square);
            Cell *to = out + (k / LANES * P + p) * LANES + k % LANES;
            for (size_t i = 0; i < VECTOR && p + i < P; i++) store_bits(to + i * LANES, square[i]);
        }
}

// n rows -> panels of E columns, cells along the rows: (n cells, E), zeros up to a multiple of VECTOR rows.
static void pack_rows(Head x, size_t n, size_t E, Cell *out) {
    size_t count = up(n, VECTOR) / DEEP;
    for (size_t j = 0; j < count; j++)
        for (size_t e = 0; e < E; e += VECTOR)
            store_bits(out + (e / LANES * count + j) * LANES + e % LANES, cells_of_rows(x, DEEP * j, n, e));
}

// m rows from `start` on as a left-hand side, cells along E, and the distance of two: in `memory` where they are fp32.
static const Cell *left_of(Head x, size_t start, size_t m, size_t E, Cell *memory, size_t *stride) {
    *stride = DEEP == 2 ? x.stride / 2 : E;
    if (DEEP == 2) return (const Cell *)x.row(start);
    for (size_t r = 0; r < m; r++)
        for (size_t e = 0; e < E; e += VECTOR) store_bits(memory + r * E + e, bits(load(x.row(start + r) + e)));
    return memory;
}

// m rows from `start` -> their transpose as a left-hand side, cells along the rows: (E, TURNED), of which the m rows' are
// written, with a zero beside an odd last row.
static void transpose(Head x, size_t start, size_t m, size_t E, Cell *out) {
    for (size_t j = 0; j < cells(m); j += VECTOR)
        for (size_t e = 0; e < E; e += VECTOR) {
            Ints square[VECTOR];
            for (size_t i = 0; i < VECTOR; i++) square[i] = cells_of_rows(x, start + DEEP * (j + i), start + m, e);
            transpose(square);
            Mask within = lanes_before(cells(m) - j);
            for (size_t i = 0; i < VECTOR; i++) store_bits(within, out + (e + i) * TURNED + j, square[i]);
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
static void product_with_keys(const Block &block, const Cell *A, size_t lda, const Cell *B, size_t P, float *C,
                              size_t ldc) {
    product(A, lda, B, P * LANES, C, ldc, block.m, block.before(), P);
    for (size_t k = block.before(); k < block.width; k += VECTOR) {
        size_t r = block.first + k > block.start ? block.first + k - block.start : 0;
        const Cell *column = B + k / LANES * P * LANES + k % LANES;
        product_of_rows<1>(A + r * lda, lda, column, LANES, C + r * ldc + k, ldc, block.m - r, P, false);
    }
}

// C (m, E) = weights (m, width) B (width, E); six rows at a time end at the last key that one of them sees.
static void product_with_weights(const Block &block, const Element *weights, size_t ld, const Cell *B, size_t panel,
                                 float *C, size_t E) {
    for (size_t r = 0, end; r < block.m; r = end) {
        end = r + 6 < block.m ? r + 6 : block.m;
        const Cell *rows = (const Cell *)(weights + r * ld);
        product(rows, ld / DEEP, B, panel, C + r * E, E, end - r, E, cells(block.to(end - 1)));
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
    Cell *keys, *values, *rows;  // Packed: keys and values as columns, and one of them as rows.
    Cell *left;                  // Queries, or the output's gradient, where cells are fp32.
    float *scores, *gradients, *of_keys, *of_values, *product;
    Element *weights;
    Cell *by_query, *gradients_by_query, *turned, *turned_output;

    // Returns the bytes that it takes; with no memory nothing else.
    static size_t carve(Scratch &out, char *memory, size_t n, size_t E, bool backward) {
        size_t bytes = 0, N = row_of(n), packed = up(n, LANES) * up(E, LANES) / DEEP;
        out.keys = taken<Cell>(memory, bytes, packed);
        out.rows = taken<Cell>(memory, bytes, packed);
        out.left = taken<Cell>(memory, bytes, DEEP == 1 ? ROWS * E : 0);
        out.scores = taken<float>(memory, bytes, ROWS * N);
        out.weights = taken<Element>(memory, bytes, ROWS * N);
        out.product = taken<float>(memory, bytes, ROWS * E);
        if (backward) {
            out.values = taken<Cell>(memory, bytes, packed);
            out.gradients = taken<float>(memory, bytes, ROWS * N);
            out.of_keys = taken<float>(memory, bytes, E * N);
            out.of_values = taken<float>(memory, bytes, E * N);
            out.by_query = taken<Cell>(memory, bytes, TURNED * N);
            out.gradients_by_query = taken<Cell>(memory, bytes, TURNED * N);
            out.turned = taken<Cell>(memory, bytes, E * TURNED);
            out.turned_output = taken<Cell>(memory, bytes, E * TURNED);
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

// 2^x within 2^-18, for values that are rounded to bf16; from 2^128 on infinite.
static inline Floats powers_of_2(Floats x) {
    constexpr float COEFFICIENTS[] = {5.591786114e-2f, 2.402474483e-1f, 6.931218146e-1f, 9.999992614e-1f};
    x = larger(all(-126.f), x);  // In this order a NaN stays.
    Floats n = nearest(x), r = x - n, p = all(9.570102030e-3f);
    for (float coefficient : COEFFICIENTS) p = fused(p, r, all(coefficient));
    return scaled(p, n);
}

// Scores (m, width) -> weights, 0 where nothing is seen, and their `sums`, by which the output is divided; `logs`:
// log2 of the sum of 2^(scale score), from which backward makes the weights again.
static void softmax(const Block &block, const float *scores, size_t ld, float scale, Element *weights, float *logs,
                    float *sums) {
    for (size_t r = 0; r < block.m; r++) {
        const float *row = scores + r * ld;
        Element *out = weights + r * ld;
        size_t start = block.from(r, block.first), end = block.to(r);
        Floats most = all(-INFINITY), sum = all(0.f);
        auto each = [&](auto body) __attribute__((always_inline)) {
            size_t k = start;
            for (; k + VECTOR <= end; k += VECTOR) body(k, Whole());
            if (k < end) body(k, lanes_before(end - k));
        };
        each([&](size_t k, auto seen) __attribute__((always_inline)) {
            most = larger(chosen(seen, load(row + k), all(-INFINITY)), most);  // A NaN is passed over.
        });
        float shift = -largest_of(most) * scale;
        memset(out, 0, start * sizeof(Element));
        each([&](size_t k, auto seen) __attribute__((always_inline)) {
            Floats weight = powers_of_2(fused(chosen(seen, load(row + k)), all(scale), all(shift)));
            store(out + k, weight);  // A row has room for a whole vector.
            sum = sum + chosen(seen, as_elements(weight));
        });
        memset(out + end, 0, (block.width - end) * sizeof(Element));
        sums[r] = sum_of(sum);
        logs[r] = std::log2(sums[r]) - shift;
    }
}

// Output (T, H, E), and of each query and head the log2 of its weights' sum (H, T).
static void forward(const Problem &x, Scratch &own, size_t document, size_t h, bf16 *output, float *logs, size_t T) {
    size_t start = (size_t)x.bounds[document], n = (size_t)x.bounds[document + 1] - start, E = x.E, G = x.H / x.K;
    size_t ld = row_of(n), panel = up(n, VECTOR) / DEEP * LANES, P = E / DEEP, stride;
    pack_columns(x.keys(start, h), n, E, own.keys);
    pack_rows(x.values(start, h), n, E, own.rows);
    for (size_t g = h * G; g < (h + 1) * G; g++) {
        Head queries = x.queries(start, g);
        for (size_t q = 0; q < n; q += ROWS) {
            Block block(q, n, x.left);
            float sums[ROWS];
            const Cell *left = left_of(queries, q, block.m, E, own.left, &stride);
            product_with_keys(block, left, stride, own.keys + block.first * P, P, own.scores, ld);
            softmax(block, own.scores, ld, x.scale, own.weights, logs + g * T + start + q, sums);
            product_with_weights(block, own.weights, ld, own.rows + block.first / DEEP * LANES, panel, own.product, E);
            for (size_t r = 0; r < block.m; r++) {
                bf16 *row = output + ((start + q + r) * x.H + g) * E;
                for (size_t e = 0; e < E; e += VECTOR)
                    store(row + e, load(own.product + r * E + e) * all(1.f / sums[r]));
            }
        }
    }
}

// DEEP rows of scores (DEEP, width), or the last one alone, and of gradients d of their weights -> panels of keys, `panel`
// apart, of cells along the queries: the weights w, 0 where nothing is seen, and the gradients of the scores (but for
// ln 2), which also go to `out` by row: w (d - D), with D the mean of d by w. A token that takes nearly all the weight is
// left with what d - D cancels to, so D is found twice: its fp32, and what that has lost. `count`: rows that there are.
static void softmax_backward(const Block &block, size_t r, size_t count, const float *scores, const float *d, size_t ld,
                             float scale, const float *logs, Element *out, Cell *of_weights, Cell *of_gradients,
                             size_t panel) {
    size_t starts[DEEP], ends[DEEP], last = count - 1;
    Floats shifts[DEEP];
    for (size_t i = 0; i < DEEP; i++) {
        size_t row = r + (i < last ? i : last);
        starts[i] = block.from(row, block.first);
        ends[i] = i < count ? block.to(row) : 0;
        shifts[i] = all(-logs[row]);
    }
    size_t start = starts[0] / VECTOR * VECTOR, end = up(block.to(r + last), VECTOR);
    auto place = [=](size_t k) { return k / LANES * panel + k % LANES; };
    auto each = [&](auto body) __attribute__((always_inline)) {
        for (size_t k = start; k < end; k += VECTOR) {
            if (count == DEEP && k >= starts[last] && k + VECTOR <= ends[0]) {
                Whole seen[DEEP];
                body(k, seen);
                continue;
            }
            Mask seen[DEEP];
            for (size_t i = 0; i < DEEP; i++) {
                Mask before = lanes_before(starts[i] > k ? starts[i] - k : 0);
                seen[i] = without(lanes_before(ends[i] > k ? ends[i] - k : 0), before);
            }
            body(k, seen);
        }
    };
    auto cells_of = [](const Floats x[DEEP]) __attribute__((always_inline)) {
        return DEEP == 2 ? pairs_of(x[0], x[DEEP - 1]) : bits(x[0]);
    };
    auto unpack = [&](size_t k, Floats w[DEEP]) __attribute__((always_inline)) {
        Ints both = load_bits(of_weights + place(k));
        w[0] = DEEP == 2 ? first_of(both) : floats(both);
        if (DEEP == 2) w[DEEP - 1] = second_of(both);
    };
    Floats sums[DEEP] = {}, totals[DEEP] = {}, rests[DEEP] = {}, means[DEEP], rest[DEEP];
    float total[DEEP];
    each([&](size_t k, auto seen) __attribute__((always_inline)) {
        Floats w[DEEP];
        for (size_t i = 0; i < DEEP; i++) {
            Floats score = chosen(seen[i], load(scores + i * ld + k));
            w[i] = as_elements(chosen(seen[i], powers_of_2(fused(score, all(scale), shifts[i]))));
        }
        store_bits(of_weights + place(k), cells_of(w));
        for (size_t i = 0; i < DEEP; i++) {
            sums[i] = fused(w[i], chosen(seen[i], load(d + i * ld + k)), sums[i]);
            totals[i] = totals[i] + w[i];
        }
    });
    for (size_t i = 0; i < DEEP; i++) {
        total[i] = i < count ? sum_of(totals[i]) : 1.f;
        means[i] = all(sum_of(sums[i]) / total[i]);
    }
    each([&](size_t k, auto seen) __attribute__((always_inline)) {
        Floats w[DEEP];
        unpack(k, w);
        for (size_t i = 0; i < DEEP; i++)
            rests[i] = fused(w[i], chosen(seen[i], load(d + i * ld + k)) - means[i], rests[i]);
    });
    for (size_t i = 0; i < DEEP; i++) rest[i] = all(sum_of(rests[i]) / total[i]);
    each([&](size_t k, auto seen) __attribute__((always_inline)) {
        Floats w[DEEP];
        unpack(k, w);
        for (size_t i = 0; i < DEEP; i++) {
            Floats less = chosen(seen[i], load(d + i * ld + k)) - means[i];
            w[i] = as_elements(w[i] * (less - rest[i]));
            store(out + i * ld + k, w[i]);
        }
        store_bits(of_gradients + place(k), cells_of(w));
    });
    auto clear = [&](size_t k, size_t to) {
        for (; k < to; k += VECTOR) {
            store_bits(of_weights + place(k), bits(all(0.f)));
            store_bits(of_gradients + place(k), bits(all(0.f)));
            for (size_t i = 0; i < DEEP; i++) store(out + i * ld + k, all(0.f));
        }
    };
    clear(0, start);  // What none sees.
    clear(end, block.width);
}

// (E, n) in fp32 times a factor -> n rows of bf16, `stride` apart.
static void write_rows(const float *from, size_t ld, size_t n, size_t E, float factor, bf16 *to, size_t stride) {
    for (size_t k = 0; k < n; k += VECTOR)
        for (size_t e = 0; e < E; e += VECTOR) {
            Ints square[VECTOR];
            for (size_t i = 0; i < VECTOR; i++) square[i] = load_bits(from + (e + i) * ld + k);
            transpose(square);
            for (size_t i = 0; i < VECTOR && k + i < n; i++)
                store(to + (k + i) * stride + e, floats(square[i]) * all(factor));
        }
}

static void backward(const Problem &x, Scratch &own, size_t document, size_t h, const bf16 *d_output, const float *logs,
                     bf16 *d_query, bf16 *d_key, bf16 *d_value, size_t T) {
    size_t start = (size_t)x.bounds[document], n = (size_t)x.bounds[document + 1] - start, E = x.E, G = x.H / x.K;
    size_t ld = row_of(n), panel = up(n, VECTOR) / DEEP * LANES, P = E / DEEP, by_query = TURNED * LANES, stride;
    float plain = x.scale * 0.6931471805599453f;
    pack_columns(x.keys(start, h), n, E, own.keys);
    pack_columns(x.values(start, h), n, E, own.values);
    pack_rows(x.keys(start, h), n, E, own.rows);
    memset(own.of_keys, 0, E * ld * sizeof(float));
    memset(own.of_values, 0, E * ld * sizeof(float));
    for (size_t q = 0; q < n; q += ROWS) {
        Block block(q, n, x.left);
        size_t m = block.m, size = cells(m);
        for (size_t g = 0; g < G; g++) {
            size_t head = h * G + g, place = g % HEADS * size;
            Head queries = x.queries(start, head), outputs = {d_output + (start * x.H + head) * E, x.H * E};
            const Cell *left = left_of(queries, q, m, E, own.left, &stride);
            product_with_keys(block, left, stride, own.keys + block.first * P, P, own.scores, ld);
            left = left_of(outputs, q, m, E, own.left, &stride);
            product_with_keys(block, left, stride, own.values + block.first * P, P, own.gradients, ld);
            for (size_t r = 0; r < m; r += DEEP)
                softmax_backward(block, r, m - r < DEEP ? m - r : DEEP, own.scores + r * ld, own.gradients + r * ld, ld, x.scale,
                                 logs + head * T + start + q, own.weights + r * ld,
                                 own.by_query + (place + r / DEEP) * LANES,
                                 own.gradients_by_query + (place + r / DEEP) * LANES, by_query);
            product_with_weights(block, own.weights, ld, own.rows + block.first / DEEP * LANES, panel, own.product, E);
            for (size_t r = 0; r < m; r++) {
                bf16 *row = d_query + ((start + q + r) * x.H + head) * E;
                for (size_t e = 0; e < E; e += VECTOR) store(row + e, load(own.product + r * E + e) * all(plain));
            }
            transpose(outputs, q, m, E, own.turned_output + place);
            transpose(queries, q, m, E, own.turned + place);
            if (g % HEADS + 1 < HEADS && g + 1 < G) continue;
            product(own.turned_output, TURNED, own.by_query, by_query,
                    own.of_values + block.first, ld, E, block.width, place + size, true);
            product(own.turned, TURNED, own.gradients_by_query, by_query,
                    own.of_keys + block.first, ld, E, block.width, place + size, true);
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
