// Products with frozen weights, NF4 or dense, and with adapters, in bf16 with fp32 sums. products.py has the contract;
// native.py compiles this file.
//
// A product is a sum of terms, such as a base and its adapter, rounded once. Weights are decoded straight into panels,
// a few megabytes at a time, which all threads then share; where cells are fp32, so are the rows of the left, a slab of
// them at a time. A row's result depends on that row alone: neither on the number of rows nor on the threads.
//
// Letters: M rows, N columns of the output, K of a term (its summed dimension), P of its cells.

#include "numbers.h"

#ifdef VECTORS
#include <cstdlib>
#include <cstring>
#include <memory>
#include <omp.h>
#include <vector>

#include "products.h"

constexpr size_t BLOCK = 64, GROUP_BLOCKS = 256;  // NF4: weights with one absmax, and blocks with one scale of those.
constexpr size_t CHUNK = 126;                     // Rows of a task.
constexpr size_t PIECE = WIDE == 4 ? 1024 : 512;  // Cells of a panel that stay in a core's cache.
constexpr size_t THIN_PIECE = 256;                // Rows of a weight read in place, LANES columns of which stay in it.
constexpr size_t FEWEST = 1 << 17;                // Pairs of a product for which other threads are woken.
constexpr size_t AT_ONCE = 4 << 20;               // Bytes of panels; more where each thread's own take more.
constexpr size_t SLAB = 16 << 20;                 // Bytes of the left's rows in fp32; more where a task's take more.
constexpr size_t BOTH = 2 * VECTOR;

// BOTH weights of a row of `width`, from `column` on, a multiple of BOTH: the first, third, ... and the second, fourth, ...
// of them, rounded to bf16; 0 beyond the row's end, where a dense row of an odd width has one number more.
static inline void weights_at(const Term &term, size_t row, size_t column, size_t width, Floats out[2]) {
    size_t start = row * width + column;
    if (term.dense) {
        Mask within = lanes_before(column < width ? (width - column + 1) / 2 : 0);
        Ints pairs = load_bits(within, term.dense + row * term.dense_stride + column);
        out[0] = first_of(pairs), out[1] = second_of(pairs);
        return;
    }
    size_t number = start / BLOCK;
    float absmax = term.absmax ? term.absmax[number]
                               : term.map[term.scales[number]] * term.group_scale[number / GROUP_BLOCKS] + *term.offset;
    alignas(64) float table[16];
    for (size_t i = 0; i < 16; i += VECTOR) store(table + i, rounded_finite(load(term.levels + i) * all(absmax)));
#ifdef __AVX512F__
    Ints bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(term.codes + start / 2)));
#else
    Ints bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(term.codes + start / 2)));
#endif
    out[0] = sixteenth(table, SIMD(srli_epi32)(bytes, 4));  // A byte is a pair: its high half is the first of the two.
    out[1] = sixteenth(table, bytes & SIMD(set1_epi32)(15));
}

// Rows n to n + LANES - 1 of a weight (N, K) as columns: (P, LANES), 0 from row N on.
template <typename Right> static void pack_rows_as_columns(const Term &term, size_t n, size_t N, Right *out) {
    constexpr bool in_pairs = !std::is_same<Right, float>::value;
    size_t K = in_pairs ? term.pairs() : term.K;
    for (size_t r = 0; r < LANES; r += VECTOR)
        for (size_t k = 0; k < term.K; k += BOTH) {
            Ints x[2][VECTOR];
            for (size_t i = 0; i < VECTOR; i++) {
                Floats both[2] = {all(0.f), all(0.f)};
                if (n + r + i < N) weights_at(term, n + r + i, k, term.K, both);
                x[0][i] = in_pairs ? pairs_of(both[0], both[1]) : bits(both[0]), x[1][i] = bits(both[1]);
            }
            for (size_t h = 0; h < (in_pairs ? 1 : 2); h++) {
                transpose(x[h]);
                size_t first = in_pairs ? k / 2 : k + h, step = in_pairs ? 1 : 2;
                for (size_t j = 0; j < VECTOR && first + step * j < K; j++)
                    store_bits(out + (first + step * j) * LANES + r, x[h][j]);
            }
        }
}

// Columns n to n + LANES - 1 of a weight (K, N): (P, LANES), 0 from column N on.
static void pack_columns_of(const Term &term, size_t n, size_t N, Cell *out) {
    for (size_t k = 0; k < term.K; k += DEEP, out += LANES)
        for (size_t c = 0; c < LANES; c += BOTH) {
            Floats above[2], below[2] = {all(0.f), all(0.f)};
            weights_at(term, k, n + c, N, above);
            interleave(above);
            if (DEEP == 2 && k + 1 < term.K) {
                weights_at(term, k + 1, n + c, N, below);
                interleave(below);
            }
            for (size_t h = 0; h < 2; h++)
                store_bits(out + c + h * VECTOR, DEEP == 2 ? pairs_of(above[h], below[h]) : bits(above[h]));
        }
}

// Memory that a thread keeps: that of its largest product so far.
struct Kept {
    std::unique_ptr<void, void (*)(void *)> memory{nullptr, std::free};
    size_t size = 0;
    Cell *take(size_t count) {
        size_t bytes = up(count * sizeof(Cell) + 1, 64);
        if (size < bytes) {
            memory.reset();
            memory.reset(std::aligned_alloc(64, bytes));
            size = memory ? bytes : 0;
        }
        return (Cell *)memory.get();
    }
};

// The left of a term in a slab.
struct Left {
    const Cell *rows;
    size_t stride;  // In cells.
};

// Rows m to m + count of the terms' left, in fp32 where cells are; `memory` is null otherwise.
static void widen_left(const Term *terms, size_t num_terms, size_t m, size_t count, Cell *memory, Left *lefts) {
    for (size_t t = 0; t < num_terms; t++) {
        const Term &term = terms[t];
        if (!memory) {
            lefts[t] = {(const Cell *)term.rows(m), term.left_stride / DEEP};
            continue;
        }
        size_t stride = 2 * term.pairs();
        lefts[t] = {memory, stride};
#pragma omp for schedule(static)
        for (size_t r = 0; r < count; r++) {
            const bf16 *from = term.rows(m + r);
            float *to = (float *)memory + r * stride;
            for (size_t k = 0; k < stride; k++) to[k] = k < term.K ? widen(from[k]) : 0.f;
        }
        memory += count * stride;
    }
}

// Write the sums (count, LANES) of rows from m on and of `columns` from `column` on.
static void write(const float *sums, const Output &out, size_t m, size_t count, size_t column, size_t columns) {
    for (size_t r = 0; r < count; r++)
        for (size_t c = 0; c < columns; c += VECTOR) {
            Floats values = load(sums + r * LANES + c) * all(out.factor);
            bf16 part[VECTOR], *to = out.rows + (m + r) * out.stride + column + c;
            size_t size = columns - c < VECTOR ? columns - c : VECTOR;
            for (const bf16 *more : {out.bias, out.added ? out.added + (m + r) * out.added_stride : nullptr}) {
                if (!more) continue;
                memcpy(part, more + column + c, size * sizeof(bf16));
                values = values + load(part);
            }
            store(part, values);
            memcpy(to, part, size * sizeof(bf16));
        }
}

// Rows m to m + count of the columns of panel `number`; `panel` has the terms that are not kept as panels, `lefts` the
// rows from `origin` on.
static void task(const Term *terms, const Left *lefts, size_t num_terms, const Cell *panel, size_t number,
                 const Output &out, size_t m, size_t count, size_t origin) {
    alignas(64) float sums[CHUNK * LANES];
    size_t column = number * LANES, columns = out.N - column < LANES ? out.N - column : LANES;
    bool add = false;
    for (size_t t = 0; t < num_terms; t++) {
        const Pair *kept = terms[t].panels ? terms[t].panels + number * terms[t].pairs() * LANES : nullptr;
        size_t P = kept ? terms[t].pairs() : cells(terms[t].K), deep = kept ? 2 / DEEP : 1;
        for (size_t p = 0; p < P; p += PIECE, add = true) {
            size_t size = P - p < PIECE ? P - p : PIECE, stride = lefts[t].stride;
            const Cell *left = lefts[t].rows + (m - origin) * stride + p * deep;
            if (kept) product_with_kept(left, stride, kept + p * LANES, sums, count, size, add);
            else product_of_rows<WIDE>(left, stride, panel + p * LANES, LANES, sums, LANES, count, size, add);
        }
        if (!kept) panel += P * LANES;
    }
    if (!add) memset(sums, 0, sizeof(sums));
    write(sums, out, m, count, column, columns);
}

// A dense product whose cells are fp32 and which has one panel: pairs of the left are read in place.
static int few_columns(const Term &term, int transposed, const Output &out, size_t M, Cell *panel) {
    if (transposed) pack_columns_of(term, 0, out.N, panel);
    else pack_rows_as_columns(term, 0, out.N, panel);
#pragma omp parallel for schedule(dynamic) if (M * out.N * term.pairs() > FEWEST)
    for (size_t m = 0; m < M; m += CHUNK) {
        alignas(64) float sums[CHUNK * LANES];
        size_t count = M - m < CHUNK ? M - m : CHUNK;
        const Pair *left = (const Pair *)term.rows(m);
        size_t stride = term.left_stride / 2, P = term.K / 2;
        if (out.N <= VECTOR) product_of_rows<1>(left, stride, panel, LANES, sums, LANES, count, P, false);
        else product_of_rows<WIDE>(left, stride, panel, LANES, sums, LANES, count, P, false);
        write(sums, out, m, count, 0, out.N);
    }
    return 1;
}

// A dense, transposed product whose cells are fp32, of up to CHUNK rows: rows of the weight are read in place.
static int few_rows(const Term &term, const Output &out, size_t M, Cell *left) {
    Left wide;
    widen_left(&term, 1, 0, M, left, &wide);
#pragma omp parallel for schedule(dynamic) if (M * out.N * term.pairs() > FEWEST)
    for (size_t column = 0; column < out.N; column += LANES) {
        alignas(64) float sums[CHUNK * LANES];
        for (size_t k = 0; k < term.K; k += THIN_PIECE)
            product_of_rows<WIDE>(wide.rows + k, wide.stride, term.dense + k * term.dense_stride + column, term.dense_stride,
                                  sums, LANES, M, term.K - k < THIN_PIECE ? term.K - k : THIN_PIECE, k > 0);
        write(sums, out, 0, M, column, LANES);
    }
    return 1;
}

EXPORTED int multiplies() { return 1; }

// Panels of a whole weight (N, K) in pairs, to be kept: (N / LANES, pairs, LANES). N is a multiple of LANES.
EXPORTED void pack_bf16(const Term *term, size_t N, Pair *out) {
#pragma omp parallel for schedule(dynamic)
    for (size_t n = 0; n < N / LANES; n++) pack_rows_as_columns(*term, n * LANES, N, out + n * term->pairs() * LANES);
}

// out (M, N) = the sum of the terms times a factor, + bias (N,) and + added (M, N) unless they are null. N and K of a
// quantized term are multiples of 64; where cells are pairs, K of a dense one is even. Returns whether there was memory.
EXPORTED int weighted_sum_bf16(const Term *terms, size_t num_terms, int transposed, const Output *output, size_t M) {
    const Output &out = *output;
    size_t N = out.N;
    size_t panel = 0, row = 0, work = 0, panels = (N + LANES - 1) / LANES;
    for (size_t t = 0; t < num_terms; t++) {
        panel += terms[t].panels ? 0 : cells(terms[t].K) * LANES;
        row += 2 * terms[t].pairs();
        work += M * N * terms[t].pairs();
    }
    size_t threads = (size_t)omp_get_max_threads(), group = panels, slab = M;
    if (panel) {
        group = AT_ONCE / (panel * sizeof(Cell));
        group = group < threads ? threads : group;
        group = group < panels ? group : panels;
    }
    static thread_local Kept kept_panels, kept_left;
    bool thin = DEEP == 1 && num_terms == 1 && terms->dense && terms->K && M;
    if (thin && transposed && M <= CHUNK && N % LANES == 0) {
        Cell *left = kept_left.take(M * row);
        return left && few_rows(*terms, out, M, left);
    }
    if (thin && N <= LANES && terms->K % 2 == 0 && terms->left_stride % 2 == 0) {
        Cell *memory = kept_panels.take(terms->K * LANES);
        return memory && few_columns(*terms, transposed, out, M, memory);
    }
    Cell *memory = panel ? kept_panels.take(group * panel) : nullptr, *left = nullptr;
    if (panel && !memory) return 0;
    if (DEEP == 1) {
        slab = SLAB / ((row + 1) * sizeof(float)) / CHUNK * CHUNK;
        slab = slab < CHUNK ? CHUNK : slab;
        slab = slab < M ? slab : M;
        left = kept_left.take(slab * row);
        if (!left) return 0;
    }
#pragma omp parallel if (work > FEWEST)
    for (size_t start = 0; start < M; start += slab) {
        std::vector<Left> lefts(num_terms);
        size_t rows = M - start < slab ? M - start : slab, chunks = (rows + CHUNK - 1) / CHUNK;
        widen_left(terms, num_terms, start, rows, left, lefts.data());
        for (size_t first = 0; first < panels; first += group) {
            size_t count = panels - first < group ? panels - first : group;
            if (panel)
#pragma omp for schedule(dynamic)
            for (size_t n = 0; n < count; n++) {
                Cell *to = memory + n * panel;
                for (size_t t = 0; t < num_terms; t++) {
                    if (terms[t].panels) continue;
                    if (transposed) pack_columns_of(terms[t], (first + n) * LANES, N, to);
                    else pack_rows_as_columns(terms[t], (first + n) * LANES, N, to);
                    to += cells(terms[t].K) * LANES;
                }
            }
#pragma omp for schedule(dynamic)
            for (size_t number = 0; number < count * chunks; number++) {
                size_t n = number % count, m = start + number / count * CHUNK, left_over = start + rows - m;
                task(terms, lefts.data(), num_terms, memory + n * panel, first + n, out, m,
                     left_over < CHUNK ? left_over : CHUNK, start);
            }
        }
    }
    return 1;
}
#else
EXPORTED int multiplies() { return 0; }
#endif
