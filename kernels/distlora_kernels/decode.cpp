// Decoder layers of Llama's form for one token of each row, whose earlier keys and values lie in blocks of tokens.
// decode.py has the contract; native.py compiles this file.
//
// Each operation is the one that a compiled run trains with (products.cpp, elementwise.cpp), so that a row's result has
// its roundings, and depends on that row alone. Attention sums in fp32, key after key.
//
// Letters: M rows, D hidden size, H query heads, K key heads, E head size, R columns of adapters of one input.

#include "numbers.h"

#ifdef VECTORS
#include <vector>

#include "products.h"

EXPORTED void norm_forward_bf16(const bf16 *, const bf16 *, bf16 *, float *, size_t, size_t, float, int);
EXPORTED void gate_forward_bf16(const bf16 *, const bf16 *, bf16 *, size_t, size_t, size_t, int);
EXPORTED void rotate_bf16(bf16 *, const bf16 *, const bf16 *, size_t, size_t, size_t, size_t, size_t, size_t, size_t,
                          size_t, int);

constexpr size_t FEWEST = 1 << 17;  // Numbers of keys, by query head, for which other threads are woken.

// decode.py has the same fields of all structures.
struct Linear {
    const Pair *panels, *up;  // Of W (N, K) and of B (N, rank); `up` is null without an adapter.
    const bf16 *bias;
    size_t N, first, rank;  // Its columns among the R.
};

struct Input {
    const Pair *down;  // Panels of all A (R, K); null without adapters.
    const float *scales;   // (R,)
    const int64_t *slots;  // (R,) slot of each column's adapter; null where rows choose none.
    size_t K, R, count;
    Linear linears[3];
};

struct Norm {
    const bf16 *weight;  // Null: there is none.
    float eps;
};

struct Layer {
    Norm before_attention, before_mlp, query, key;
    Input attention, attended, mlp, product;
    bf16 *keys, *values;  // (places, K, E)
    float scale;
    int64_t window;  // Tokens that a token sees, itself included; 0: all.
};

struct Shape {
    size_t M, D, H, K, E, inner, turned, blocks, block;
    int gelu;
};

struct Places {
    const bf16 *cosines, *sines;             // (M, turned)
    const int64_t *written, *tables, *lengths;  // Place of the new token; blocks (M, blocks); tokens seen, it included.
    const int64_t *slots;                    // (M,) slot of each row's adapter, -1 for none; null: the only adapter.
};

using Rows = std::vector<bf16>;

// The linears of one input x (M, K), to `outs`.
static bool multiply(const Input &input, const Rows &x, Rows &gated, Rows *outs, size_t M, const int64_t *slots) {
    auto term = [](const bf16 *left, size_t stride, size_t K, const Pair *panels) {
        Term made{};
        made.left = left, made.left_stride = stride, made.K = K, made.panels = panels;
        return made;
    };
    Term base = term(x.data(), input.K, input.K, input.down);
    size_t R = input.R;
    if (R) {
        gated.resize(M * R);
        Output down{gated.data(), R, R, nullptr, nullptr, 0, 1.f};
        if (!weighted_sum_bf16(&base, 1, 0, &down, M)) return false;
        for (size_t m = 0; m < M; m++)
            for (size_t r = 0; r < R; r++) {
                bf16 &value = gated[m * R + r];
                bool own = !slots || !input.slots || slots[m] == input.slots[r];
                value = own ? narrow<bf16>(widen(value) * input.scales[r]) : (bf16)0;
            }
    }
    for (size_t i = 0; i < input.count; i++) {
        const Linear &linear = input.linears[i];
        base.panels = linear.panels;
        Term terms[] = {base, term(gated.data() + linear.first, R, linear.rank, linear.up)};
        outs[i].resize(M * linear.N);
        Output out{outs[i].data(), linear.N, linear.N, linear.bias, nullptr, 0, 1.f};
        if (!weighted_sum_bf16(terms, linear.up ? 2 : 1, 0, &out, M)) return false;
    }
    return true;
}

static void normalize(Norm norm, const bf16 *x, bf16 *y, std::vector<float> &inverse, size_t M, size_t N) {
    inverse.resize(M);
    norm_forward_bf16(x, norm.weight, y, inverse.data(), M, N, norm.eps, 0);
}

// The sum of V vectors of columns of the values, by their weights times a factor.
template <size_t V>
static inline void weigh(const float *weights, size_t seen, const bf16 *values, const std::vector<size_t> &places,
                         float factor, bf16 *out) {
    Floats sums[V];
    for (size_t v = 0; v < V; v++) sums[v] = all(0.f);
    for (size_t t = 0; t < seen; t++)
        for (size_t v = 0; v < V; v++)
            sums[v] = fused(all(weights[t]), load(values + places[t] + v * VECTOR), sums[v]);
    for (size_t v = 0; v < V; v++) store(out + v * VECTOR, sums[v] * all(factor));
}

// Of each row the G query heads of a key head, over its keys one after the other.
static void attend(const Layer &layer, const Shape &s, const Places &at, const bf16 *queries, bf16 *output) {
    size_t G = s.H / s.K, E = s.E, work = 0;
    for (size_t m = 0; m < s.M; m++) work += (size_t)at.lengths[m] * s.H * E;
#pragma omp parallel if (work > FEWEST)
    {
        std::vector<float> scores, query(G * E);
        std::vector<size_t> places;
#pragma omp for schedule(dynamic) collapse(2)
        for (size_t m = 0; m < s.M; m++)
            for (size_t h = 0; h < s.K; h++) {
                size_t end = (size_t)at.lengths[m], window = (size_t)layer.window;
                size_t start = window && end > window ? end - window : 0, seen = end - start;
                scores.resize(G * seen);
                places.resize(seen);
                for (size_t t = start; t < end; t++) {
                    size_t block = (size_t)at.tables[m * s.blocks + t / s.block];
                    places[t - start] = ((block * s.block + t % s.block) * s.K + h) * E;
                }
                size_t first = (m * s.H + h * G) * E;
                for (size_t i = 0; i < G * E; i += VECTOR)
                    store(query.data() + i, load(queries + first + i) * all(layer.scale));
                for (size_t t = 0; t < seen; t++)
                    for (size_t g = 0; g < G; g++) {
                        Floats sum = all(0.f);
                        for (size_t e = 0; e < E; e += VECTOR)
                            sum = fused(load(query.data() + g * E + e), load(layer.keys + places[t] + e), sum);
                        scores[g * seen + t] = sum_of(sum);
                    }
                for (size_t g = 0; g < G; g++) {
                    float *score = scores.data() + g * seen, most = score[0], total = 0;
#pragma omp simd reduction(max : most)
                    for (size_t t = 0; t < seen; t++) most = score[t] > most ? score[t] : most;
#pragma omp simd reduction(+ : total)
                    for (size_t t = 0; t < seen; t++) total += score[t] = exponential(score[t] - most);
                    size_t e = 0;
                    bf16 *out = output + first + g * E;
                    for (; e + LANES <= E; e += LANES) weigh<WIDE>(score, seen, layer.values + e, places, 1.f / total, out + e);
                    for (; e < E; e += VECTOR) weigh<1>(score, seen, layer.values + e, places, 1.f / total, out + e);
                }
            }
    }
}

static void add(Rows &x, const Rows &y) {
    for (size_t i = 0; i < x.size(); i++) x[i] = narrow<bf16>(widen(x[i]) + widen(y[i]));
}

EXPORTED int decodes() { return 1; }

// hidden (M, D) of the new tokens, in place, through all layers. Returns whether there was memory.
EXPORTED int decode_bf16(const Layer *layers, size_t num_layers, const Shape *shape, const Places *places, bf16 *hidden) {
    const Shape &s = *shape;
    size_t M = s.M, E = s.E;
    Rows x(hidden, hidden + M * s.D), normal(M * s.D), attended(M * s.H * E), product(M * s.inner), gated, outs[3];
    std::vector<float> inverse;
    for (const Layer *layer = layers; layer < layers + num_layers; layer++) {
        normalize(layer->before_attention, x.data(), normal.data(), inverse, M, s.D);
        if (!multiply(layer->attention, normal, gated, outs, M, places->slots)) return 0;
        for (size_t i = 0; i < 2; i++) {
            size_t heads = i ? s.K : s.H;
            Norm norm = i ? layer->key : layer->query;
            if (norm.weight) normalize(norm, outs[i].data(), outs[i].data(), inverse, M * heads, E);
            rotate_bf16(outs[i].data(), places->cosines, places->sines, M, heads, 1, s.turned, heads * E, E, 0, s.turned, 0);
        }
        for (size_t m = 0; m < M; m++)
            for (size_t i = 0, size = s.K * E; i < size; i++) {
                layer->keys[(size_t)places->written[m] * size + i] = outs[1][m * size + i];
                layer->values[(size_t)places->written[m] * size + i] = outs[2][m * size + i];
            }
        attend(*layer, s, *places, outs[0].data(), attended.data());
        if (!multiply(layer->attended, attended, gated, outs, M, places->slots)) return 0;
        add(x, outs[0]);
        normalize(layer->before_mlp, x.data(), normal.data(), inverse, M, s.D);
        if (!multiply(layer->mlp, normal, gated, outs, M, places->slots)) return 0;
        gate_forward_bf16(outs[0].data(), outs[1].data(), product.data(), M, s.inner, s.inner, s.gelu);
        if (!multiply(layer->product, product, gated, outs, M, places->slots)) return 0;
        add(x, outs[0]);
    }
    for (size_t i = 0; i < x.size(); i++) hidden[i] = x[i];
    return 1;
}
#else
EXPORTED int decodes() { return 0; }
#endif
