// Products with frozen weights, NF4 or dense, and with adapters, in bf16 with fp32 sums, for processors with AVX512-BF16
// and without AMX, whose library products are faster. lora_native.py has the contract; native.py compiles this file.
//
// A product is a sum of terms, such as a base and its adapter, rounded once. Weights are decoded straight into panels,
// a few megabytes at a time, which all threads then share. A row's result depends on that row alone: neither on the
// number of rows nor on the threads.
//
// Letters: M rows, N columns of the output, K of a term (its summed dimension), P = K / 2 pairs.

#include "numbers.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <cstdlib>
#include <memory>
#include <omp.h>

#include "products.h"

constexpr size_t BLOCK = 64, GROUP_BLOCKS = 256;  // NF4: weights with one absmax, and blocks with one scale of those.
constexpr size_t CHUNK = 126, PIECE = 1024;       // Rows of a task; pairs of a panel that stay in a core's cache.
constexpr size_t FEWEST = 1 << 17;                // Pairs of a product for which other threads are woken.
constexpr size_t AT_ONCE = 4 << 20;               // Bytes of panels; more where each thread's own take more.

// The 64 weights of a block of a row of `width` weights, as two vectors of 32; 0 beyond the row's end.
static inline void load(const Term &term, size_t row, size_t block, size_t width, __m512i out[2]) {
    size_t start = row * width + block * BLOCK;
    if (term.dense) {
        for (size_t h = 0; h < 2; h++) {
            size_t from = block * BLOCK + h * 32, count = from < width ? width - from : 0;
            __mmask32 mask = count < 32 ? ((__mmask32)1 << count) - 1 : ~(__mmask32)0;
            out[h] = _mm512_maskz_loadu_epi16(mask, term.dense + start + h * 32);
        }
        return;
    }
    size_t number = start / BLOCK;
    float absmax = term.absmax ? term.absmax[number]
                               : term.map[term.scales[number]] * term.group_scale[number / GROUP_BLOCKS] + *term.offset;
    __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(term.levels), _mm512_set1_ps(absmax)));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));  // As `narrow`; all are finite.
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    for (size_t h = 0; h < 2; h++) {  // A byte is a pair: its high half is the first of the two.
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(term.codes + start / 2 + h * 16)));
        __m512i low = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), 16);
        out[h] = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(bytes, 4), low), table);
    }
}

// Rows n to n + 63 of a weight (N, K) as columns: (P, 64).
static void pack_rows_as_columns(const Term &term, size_t n, uint32_t *out) {
    size_t P = term.pairs();
    for (size_t r = 0; r < LANES; r += 16)
        for (size_t p = 0; p < P; p += BLOCK / 2) {
            __m512i x[2][16];
            for (size_t i = 0; i < 16; i++) {
                __m512i both[2];
                load(term, n + r + i, p / (BLOCK / 2), term.K, both);
                x[0][i] = both[0], x[1][i] = both[1];
            }
            for (size_t h = 0; h < 2; h++) {
                transpose(x[h]);
                for (size_t j = 0; j < 16 && p + h * 16 + j < P; j++)
                    _mm512_storeu_si512(out + (p + h * 16 + j) * LANES + r, x[h][j]);
            }
        }
}

// Columns n to n + 63 of a weight (K, N): (P, 64).
static void pack_columns_of(const Term &term, size_t n, size_t N, uint32_t *out) {
    alignas(64) uint16_t places[2][32];
    for (size_t i = 0; i < 64; i++) places[i / 32][i % 32] = (uint16_t)(i / 2 + (i % 2) * 32);
    __m512i first = _mm512_load_si512(places[0]), second = _mm512_load_si512(places[1]);
    for (size_t p = 0; p < term.pairs(); p++, out += LANES) {
        __m512i above[2], below[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        load(term, 2 * p, n / BLOCK, N, above);
        if (2 * p + 1 < term.K) load(term, 2 * p + 1, n / BLOCK, N, below);
        for (size_t h = 0; h < 2; h++) {
            _mm512_storeu_si512(out + h * 32, _mm512_permutex2var_epi16(above[h], first, below[h]));
            _mm512_storeu_si512(out + h * 32 + 16, _mm512_permutex2var_epi16(above[h], second, below[h]));
        }
    }
}

// Memory of panels: that of the calling thread's largest product so far.
static uint32_t *panels_of(size_t bytes) {
    static thread_local std::unique_ptr<uint32_t, void (*)(void *)> memory(nullptr, std::free);
    static thread_local size_t size = 0;
    if (size < bytes) {
        memory.reset();
        memory.reset((uint32_t *)std::aligned_alloc(64, bytes));
        size = memory ? bytes : 0;
    }
    return memory.get();
}

// Rows m to m + count of the 64 columns of panel `number`; `panel` has the terms that are not kept as panels.
static void task(const Term *terms, size_t num_terms, const uint32_t *panel, size_t number, const bf16 *bias, bf16 *out,
                 size_t m, size_t count, size_t N) {
    alignas(64) float sums[CHUNK * LANES];
    bool add = false;
    for (size_t t = 0; t < num_terms; t++) {
        size_t P = terms[t].pairs();
        const uint32_t *from = terms[t].panels ? terms[t].panels + number * P * LANES : panel;
        for (size_t p = 0; p < P; p += PIECE, add = true) {
            size_t pairs = P - p < PIECE ? P - p : PIECE;
            const Pair *left = terms[t].rows(m) + p;
            size_t stride = terms[t].left_stride / 2;
            if (terms[t].panels) product_with_kept(left, stride, from + p * LANES, sums, count, pairs, add);
            else product_of_rows<4>(left, stride, from + p * LANES, sums, LANES, count, pairs, add);
        }
        if (!terms[t].panels) panel += P * LANES;
    }
    for (size_t r = 0; r < count; r++)
        for (size_t h = 0; h < LANES; h += 32) {
            __m512 low = _mm512_load_ps(sums + r * LANES + h), high = _mm512_load_ps(sums + r * LANES + h + 16);
            if (bias) {
                low = _mm512_add_ps(low, _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256((const __m256i *)(bias + h))));
                high = _mm512_add_ps(high, _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256((const __m256i *)(bias + h + 16))));
            }
            _mm512_storeu_si512(out + r * N + h, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
}

EXPORTED int multiplies() { return 1; }

// Panels of a whole weight (N, K), to be kept: (N / 64, P, 64).
EXPORTED void pack_bf16(const Term *term, size_t N, uint32_t *out) {
#pragma omp parallel for schedule(dynamic)
    for (size_t n = 0; n < N / LANES; n++) pack_rows_as_columns(*term, n * LANES, out + n * term->pairs() * LANES);
}

// out (M, N) = the sum of the terms, + bias (N,) unless it is null. N is a multiple of 64, and so is the K of a quantized
// term; every other K is even where the weight is (N, K). Returns whether there was memory.
EXPORTED int weighted_sum_bf16(const Term *terms, size_t num_terms, int transposed, const bf16 *bias, bf16 *out, size_t M,
                               size_t N) {
    size_t pairs = 0, work = 0, panels = N / LANES, chunks = (M + CHUNK - 1) / CHUNK;
    for (size_t t = 0; t < num_terms; t++) {
        pairs += terms[t].panels ? 0 : terms[t].pairs();
        work += M * N * terms[t].pairs();
    }
    size_t panel = pairs * LANES, threads = (size_t)omp_get_max_threads(), group = panels;
    if (panel) {
        group = AT_ONCE / (panel * sizeof(uint32_t));
        group = group < threads ? threads : group;
        group = group < panels ? group : panels;
    }
    uint32_t *memory = panel ? panels_of(up(group * panel * sizeof(uint32_t), 64)) : nullptr;
    if (panel && !memory) return 0;
#pragma omp parallel if (work > FEWEST)
    for (size_t first = 0; first < panels; first += group) {
        size_t count = panels - first < group ? panels - first : group;
        if (panel)
#pragma omp for schedule(dynamic)
        for (size_t n = 0; n < count; n++) {
            uint32_t *to = memory + n * panel;
            for (size_t t = 0; t < num_terms; t++) {
                if (terms[t].panels) continue;
                if (transposed) pack_columns_of(terms[t], (first + n) * LANES, N, to);
                else pack_rows_as_columns(terms[t], (first + n) * LANES, to);
                to += terms[t].pairs() * LANES;
            }
        }
#pragma omp for schedule(dynamic)
        for (size_t number = 0; number < count * chunks; number++) {
            size_t n = number / chunks, m = number % chunks * CHUNK, column = (first + n) * LANES;
            task(terms, num_terms, memory + n * panel, first + n, bias ? bias + column : nullptr, out + m * N + column,
                 m, M - m < CHUNK ? M - m : CHUNK, N);
        }
    }
    return 1;
}
#else
EXPORTED int multiplies() { return 0; }
#endif
