// What a CPU does between the matrix products of a decoding step, each in one pass over its data.
//
// Every function is plain C to the caller, takes rows of float or bf16, computes in fp32 and rounds once (experts: where
// the trainer does).
// Rows are independent and each is summed in a fixed order, so a row's result does not depend on its
// neighbours, on the number of threads or on the block size.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int MAX_HEADS = 4;  // query heads that share one reading of a key or value
constexpr int SUM_BLOCK = 8 * WIDTH;  // tokens of the vocabulary summed before the search looks inside

// -- norms and activations ----------------------------------------------------------------------

template <typename T>
float inverse_rms(const T* x, int64_t width, float eps) {
  Floats squares = {};
  for (int64_t i = 0; i < width; i += WIDTH) {
    const Floats v = load(x + i, width - i);
    squares += v * v;
  }
  return 1.0f / std::sqrt(sum(squares) / width + eps);
}

// out = x / rms(x) * weight; `x` may be `out`.
template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  const float scale = inverse_rms(x, width, eps);
  for (int64_t i = 0; i < width; i += WIDTH)
    store(out + i, load(x + i, width - i) * scale * load(weight + i, width - i), width - i);
}

// hidden += delta (when there is one), then out = RMSNorm(hidden). All [rows, width].
template <typename T>
void add_norm(T* hidden, const T* delta, const T* weight, T* out, int64_t rows, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    T* h = hidden + row * width;
    for (int64_t i = 0; delta && i < width; i += WIDTH)
      store(h + i, load(h + i, width - i) + load(delta + row * width + i, width - i), width - i);
    norm_row(h, weight, out + row * width, width, eps);
  }
}

// out [rows, width] = silu(gate) * up, of [rows, gate and up].
template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Floats g = load(gate + i, width - i);
      store(out + row * width + i, g / (1.0f + exponential(-g)) * load(up + i, width - i), width - i);
    }
  }
}

// -- mixture of experts -------------------------------------------------------------------------

constexpr int MAX_ROWS = 4;  // tokens that share one reading of a weight

// One layer's experts of this rank, and the tokens that come. Mirrored in native.py.
struct ExpertsOfLayer {
  int64_t tokens, top_k, width, inner;  // of a token; of an expert
  int64_t first, held;  // this rank has the experts [first, first + held)
  int64_t threads;
};

// at_a[r] = the product of row r of x and `a`, at_b[r] that with `b`. Rows of x are floats, zero behind
// their end, and `apart` from each other; results of rows are `out_apart`.
template <int ROWS, typename T>
void multiply_two(const float* x, int64_t apart, const T* a, const T* b, int64_t width, float* at_a,
                  float* at_b, int64_t out_apart) {
  Floats sums_a[ROWS] = {}, sums_b[ROWS] = {};
  for (int64_t i = 0; i < width; i += WIDTH) {
    const Floats of_a = load(a + i, width - i), of_b = load(b + i, width - i);
    for (int r = 0; r < ROWS; r++) {
      const Floats of_x = load(x + r * apart + i);
      sums_a[r] += of_x * of_a;
      sums_b[r] += of_x * of_b;
    }
  }
  for (int r = 0; r < ROWS; r++) {
    at_a[r * out_apart] = sum(sums_a[r]);
    at_b[r * out_apart] = sum(sums_b[r]);
  }
}

// The same for any number of rows.
template <typename T>
void multiply_rows(int64_t rows, const float* x, int64_t apart, const T* a, const T* b, int64_t width,
                   float* at_a, float* at_b, int64_t out_apart) {
  for (int64_t r = 0; r < rows; r += MAX_ROWS) {
    const float* from = x + r * apart;
    float *to_a = at_a + r * out_apart, *to_b = at_b + r * out_apart;
    switch (std::min<int64_t>(rows - r, MAX_ROWS)) {
      case 1: multiply_two<1>(from, apart, a, b, width, to_a, to_b, out_apart); break;
      case 2: multiply_two<2>(from, apart, a, b, width, to_a, to_b, out_apart); break;
      case 3: multiply_two<3>(from, apart, a, b, width, to_a, to_b, out_apart); break;
      default: multiply_two<4>(from, apart, a, b, width, to_a, to_b, out_apart);
    }
  }
}

// One expert over the copies of tokens that go to it: found[copy] = down(silu(gate x) * up x * weight).
// gate_up [2 inner, width], down [width, inner]. Before the second product it rounds wherever the trainer
// and PyTorch do: gate x and up x, silu * up, and that times the weight.
template <typename T>
void run_expert(const ExpertsOfLayer& layer, const std::vector<int64_t>& copies, const T* x,
                const float* weights, const T* gate_up, const T* down, float* found) {
  thread_local std::vector<float> scratch;
  const int64_t rows = copies.size(), width = layer.width, inner = layer.inner;
  const int64_t wide = padded(width), long_inner = padded(inner);
  scratch.assign(rows * (2 * wide + 2 * long_inner), 0.0f);
  float *tokens = scratch.data(), *gates = tokens + rows * wide, *ups = gates + rows * long_inner;
  float* results = ups + rows * long_inner;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < width; i += WIDTH)
      store(tokens + r * wide + i, load(x + copies[r] / layer.top_k * width + i, width - i));
  for (int64_t f = 0; f < inner; f++)
    multiply_rows(rows, tokens, wide, gate_up + f * width, gate_up + (inner + f) * width, width, gates + f,
                  ups + f, long_inner);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t f = 0; f < inner; f += WIDTH) {
      const Floats g = rounded<T>(load(gates + r * long_inner + f));
      const Floats u = rounded<T>(load(ups + r * long_inner + f));
      const Floats hidden = rounded<T>(g / (1.0f + exponential(-g)) * u);
      store(gates + r * long_inner + f, rounded<T>(hidden * weights[copies[r]]));
    }
  for (int64_t o = 0; o < width; o += 2) {
    const int64_t next = std::min(o + 1, width - 1);
    multiply_rows(rows, gates, long_inner, down + o * inner, down + next * inner, inner, results + o,
                  results + next, wide);
  }
  for (int64_t r = 0; r < rows; r++)
    std::memcpy(found + copies[r] * width, results + r * wide, width * sizeof(float));
}

// x, out [tokens, width], ids and weights [tokens, top_k]: out = the sum of what this rank's experts make
// of each token, in the order of its ids.
template <typename T>
void experts(const ExpertsOfLayer* given, const T* x, const int64_t* ids, const float* weights,
             const T* gate_up, const T* down, T* out) {
  thread_local std::vector<float> products;
  const ExpertsOfLayer layer = *given;
  const int64_t width = layer.width, size = layer.inner * width;
  std::vector<std::vector<int64_t>> copies_of(layer.held);
  for (int64_t copy = 0; copy < layer.tokens * layer.top_k; copy++) {
    const int64_t expert = ids[copy] - layer.first;
    if (expert >= 0 && expert < layer.held) copies_of[expert].push_back(copy);
  }
  products.resize(layer.tokens * layer.top_k * width + WIDTH);
  float* found = products.data();
#pragma omp parallel for num_threads(layer.threads) schedule(dynamic)
  for (int64_t e = 0; e < layer.held; e++)
    if (!copies_of[e].empty())
      run_expert(layer, copies_of[e], x, weights, gate_up + 2 * e * size, down + e * size, found);
#pragma omp parallel for num_threads(layer.threads) schedule(static)
  for (int64_t token = 0; token < layer.tokens; token++)
    for (int64_t i = 0; i < width; i += WIDTH) {
      Floats total = {};
      for (int64_t copy = token * layer.top_k; copy < (token + 1) * layer.top_k; copy++) {
        const int64_t expert = ids[copy] - layer.first;
        if (expert >= 0 && expert < layer.held) total += load(found + copy * width + i);
      }
      store(out + token * width + i, total, width - i);
    }
}

// -- attention over blocks ----------------------------------------------------------------------

// What a kernel reads of `row`, VECTORS vectors, it asks for of the next block, `ahead`, at the same time:
// blocks lie anywhere, so the processor cannot guess.
template <int VECTORS, typename T>
inline void ask(const T* row) {
  constexpr int LINE = 64;
  for (size_t at = 0; at < VECTORS * WIDTH * sizeof(T); at += LINE) __builtin_prefetch((const char*)row + at);
}

// out[h][i] = (ADD: +=) the sum over n of factors[h][n] * rows[n][i], for VECTORS vectors of i. Rows are
// `width` apart; `left` is what they hold from here on, WHOLE says that it is all of these.
template <int HEADS, int VECTORS, bool WHOLE, bool ADD, typename T>
void multiply_tile(const float* factors, int64_t factors_apart, const T* rows, const T* ahead, int64_t width,
                   int64_t left, int64_t count, float* out, int64_t out_apart) {
  Floats found[HEADS][VECTORS] = {};
  for (int h = 0; ADD && h < HEADS; h++)
    for (int v = 0; v < VECTORS; v++) found[h][v] = load(out + h * out_apart + v * WIDTH);
  for (int64_t n = 0; n < count; n++) {
    ask<VECTORS>(ahead + n * width);
    for (int v = 0; v < VECTORS; v++) {
      const Floats x = load<WHOLE>(rows + n * width + v * WIDTH, left - v * WIDTH);
      for (int h = 0; h < HEADS; h++) found[h][v] += factors[h * factors_apart + n] * x;
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < VECTORS; v++) store(out + h * out_apart + v * WIDTH, found[h][v]);
}

// The same for the first `wanted` columns of one block of keys or values, `count` rows of `width`. Columns
// beyond, up to the end of a vector, are written and meaningless.
template <int HEADS, bool ADD, typename T>
void multiply_block(const float* factors, int64_t factors_apart, const T* rows, const T* ahead, int64_t width,
                    int64_t wanted, int64_t count, float* out, int64_t out_apart) {
  int64_t at = 0;
  const auto run = [&](auto tile, int64_t columns) {
    for (; wanted - at > columns - WIDTH && width - at >= columns; at += columns)
      tile(factors, factors_apart, rows + at, ahead + at, width, width - at, count, out + at, out_apart);
  };
  run(multiply_tile<HEADS, 4, true, ADD, T>, 4 * WIDTH);
  run(multiply_tile<HEADS, 2, true, ADD, T>, 2 * WIDTH);
  run(multiply_tile<HEADS, 1, true, ADD, T>, WIDTH);
  if (at < wanted)
    multiply_tile<HEADS, 1, false, ADD>(factors, factors_apart, rows + at, ahead + at, width, width - at,
                                        count, out + at, out_apart);
}

// weights = exp(score * scale - the largest); returns their sum.
float soften(float* scores, int64_t count, float scale) {
  Floats top = Floats{} - INFINITY;
  for (int64_t t = count; t % WIDTH; t++) scores[t] = -INFINITY;  // the vector that the end cuts
  for (int64_t t = 0; t < count; t += WIDTH) top = larger(top, load(scores + t));
  const float highest = largest(top);
  Floats total = {};
  for (int64_t t = 0; t < count; t += WIDTH) {
    const Floats weight = exponential((load(scores + t) - highest) * scale);
    store(scores + t, weight);
    total += weight;
  }
  return sum(total);
}

// One step's samples, and where their tokens are. Mirrored in native.py.
struct DecodeStep {
  int64_t rows, kv_heads, per_group, dim, value_dim, block, table_width, threads;  // of a key; of a value
  float eps, scale;  // of norms; of scores before the softmax
  const int32_t* table;  // [rows, table_width] blocks of each sample in order
  const int64_t* positions;  // [rows] of the new token
  const void *cos, *sin;  // [positions, dim]
};

// One layer's cache: keys [blocks, kv heads, dim, block], values [blocks, kv heads, block, value dim], which
// is dim but for latent attention.
template <typename T>
struct Cache {
  T *keys, *values;
};

template <typename T>
void turn(T* x, const T* norm, const T* cos, const T* sin, int64_t dim, float eps, float* out) {
  if (norm) norm_row(x, norm, x, dim, eps);
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += WIDTH) {
    const int64_t left = half - i;
    const Floats a = load(x + i, left), b = load(x + half + i, left);
    store(out + i, a * load(cos + i, left) - b * load(sin + i, left), left);
    store(out + half + i, b * load(cos + half + i, left) + a * load(sin + half + i, left), left);
  }
}

// HEADS query heads of one sample against one kv head.
template <int HEADS, typename T>
void attend_heads(const DecodeStep& step, const Cache<T>& cache, int64_t row, int64_t head, const float* queries,
                  std::vector<float>& scratch, T* out) {
  const int64_t dim = step.dim, block = step.block, count = step.positions[row] + 1;
  const int64_t last = (count - 1) / block, filled = count - last * block;
  const int64_t stride = (count + 2 * WIDTH) / WIDTH * WIDTH, padded = (dim + WIDTH - 1) / WIDTH * WIDTH;
  scratch.resize(std::max<size_t>(scratch.size(), HEADS * (stride + padded)));
  float *scores = scratch.data(), *mixed = scores + HEADS * stride;
  std::fill_n(mixed, HEADS * padded, 0.0f);
  const auto lies = [&](int64_t of, int64_t number) {
    return (step.table[of * step.table_width + number] * step.kv_heads + head) * dim * block;
  };
  const T* first_values = cache.values + lies(row, 0);
  for (int64_t b = 0; b <= last; b++)  // queries times keys, which lie [dim][block]
    multiply_block<HEADS, false>(queries, dim, cache.keys + lies(row, b),
                                 b < last ? cache.keys + lies(row, b + 1) : first_values, block,
                                 b < last ? block : filled, dim, scores + b * block, stride);
  float totals[HEADS];
  for (int h = 0; h < HEADS; h++) totals[h] = soften(scores + h * stride, count, step.scale);
  const T* next_keys = cache.keys + lies(std::min(row + 1, step.rows - 1), 0);
  for (int64_t b = 0; b <= last; b++)  // weights times values, which lie [block][dim]
    multiply_block<HEADS, true>(scores + b * block, stride, cache.values + lies(row, b),
                                b < last ? cache.values + lies(row, b + 1) : next_keys, dim, dim,
                                b < last ? block : filled, mixed, padded);
  for (int h = 0; h < HEADS; h++)
    for (int64_t d = 0; d < dim; d += WIDTH)
      store(out + h * dim + d, load(mixed + h * padded + d) / totals[h], dim - d);
}

// One sample and kv head: normalise and turn queries and key, write the new key and value, attend.
template <typename T>
void attend_one(const DecodeStep& step, const Cache<T>& cache, T* qkv, const T* q_norm, const T* k_norm,
                int64_t row, int64_t head, T* out) {
  thread_local std::vector<float> queries, scratch;
  const int64_t dim = step.dim, block = step.block, group = step.per_group, at = step.positions[row];
  T* mine = qkv + (row * step.kv_heads + head) * (group + 2) * dim;
  const T *cos = (const T*)step.cos + at * dim, *sin = (const T*)step.sin + at * dim;
  queries.resize((group + 1) * dim + WIDTH);
  for (int64_t h = 0; h <= group; h++)
    turn(mine + h * dim, h < group ? q_norm : k_norm, cos, sin, dim, step.eps, queries.data() + h * dim);
  const int64_t last = step.table[row * step.table_width + at / block] * step.kv_heads + head;
  T* key = cache.keys + last * dim * block + at % block;
  for (int64_t d = 0; d < dim; d += WIDTH) {
    T rounded[WIDTH];
    store(rounded, load(queries.data() + group * dim + d, dim - d));
    for (int64_t i = d; i < std::min(dim, d + WIDTH); i++) key[i * block] = rounded[i - d];
  }
  std::memcpy(cache.values + (last * block + at % block) * dim, mine + (group + 1) * dim, dim * sizeof(T));
  T* to = out + (row * step.kv_heads + head) * group * dim;
  for (int64_t h = 0; h < group; h += MAX_HEADS) {
    const float* q = queries.data() + h * dim;
    switch (std::min<int64_t>(group - h, MAX_HEADS)) {
      case 1: attend_heads<1>(step, cache, row, head, q, scratch, to + h * dim); break;
      case 2: attend_heads<2>(step, cache, row, head, q, scratch, to + h * dim); break;
      case 3: attend_heads<3>(step, cache, row, head, q, scratch, to + h * dim); break;
      default: attend_heads<4>(step, cache, row, head, q, scratch, to + h * dim);
    }
  }
}

// qkv [rows, kv heads, per group + 2, dim] as the product gave it -> out [rows, heads * dim]. Samples of a
// group are neighbours, so their shared prompt blocks are still in the cache when the next one reads them.
template <typename T>
void attend(const DecodeStep* step, T* keys, T* values, T* qkv, const T* q_norm, const T* k_norm, T* out) {
  const Cache<T> cache{keys, values};
#pragma omp parallel for num_threads(step->threads) schedule(dynamic, 4) collapse(2)
  for (int64_t head = 0; head < step->kv_heads; head++)
    for (int64_t row = 0; row < step->rows; row++)
      attend_one(*step, cache, qkv, q_norm, k_norm, row, head, out);
}

// -- latent attention over blocks ---------------------------------------------------------------

constexpr int LATENT_HEADS = 16;  // query heads that share one pass over a sample's blocks
constexpr int TILE_TOKENS = 4;  // whose scores with HEADS heads are summed in registers

// scores[h][t] += the product of query h and latent t, for TOKENS latents that follow each other. Queries are
// floats, zero behind their end.
template <int HEADS, int TOKENS, typename T>
void score_latents(const float* queries, int64_t apart, const T* latents, int64_t rank, float* scores,
                   int64_t stride) {
  Floats sums[HEADS][TOKENS] = {};
  for (int64_t i = 0; i < rank; i += WIDTH) {
    Floats of_latents[TOKENS];
    for (int t = 0; t < TOKENS; t++) of_latents[t] = load(latents + t * rank + i, rank - i);
    for (int h = 0; h < HEADS; h++) {
      const Floats of_query = load(queries + h * apart + i);
      for (int t = 0; t < TOKENS; t++) sums[h][t] += of_query * of_latents[t];
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int t = 0; t < TOKENS; t++) scores[h * stride + t] += sum(sums[h][t]);
}

// What a pass reads of one sample, and its scratch: scores [heads, stride], mixed latents [heads, apart].
template <typename T>
struct LatentPass {
  const DecodeStep& step;
  const T *keys, *latents;  // those of the cache
  const int32_t* table;  // of this sample
  int64_t count, stride, apart;
  float *scores, *mixed;

  int64_t filled(int64_t b) const { return std::min(step.block, count - b * step.block); }
  const T* keys_of(int64_t b) const { return keys + table[b] * step.dim * step.block; }
  const T* latents_of(int64_t b) const { return latents + table[b] * step.value_dim * step.block; }
};

// Scores of HEADS heads from `head` on with block b: of the turned parts, then of the latents.
template <int HEADS, typename T>
void score_block(const LatentPass<T>& pass, int64_t b, int64_t head, const float* queries, const float* turned) {
  const int64_t rank = pass.step.value_dim, dim = pass.step.dim, count = pass.filled(b);
  const T *keys = pass.keys_of(b), *latents = pass.latents_of(b);
  float* scores = pass.scores + head * pass.stride + b * pass.step.block;
  multiply_block<HEADS, false>(turned + head * dim, dim, keys, latents, pass.step.block, count, dim, scores,
                               pass.stride);
  const float* of_heads = queries + head * pass.apart;
  int64_t t = 0;
  for (; t + TILE_TOKENS <= count; t += TILE_TOKENS)
    score_latents<HEADS, TILE_TOKENS>(of_heads, pass.apart, latents + t * rank, rank, scores + t, pass.stride);
  for (; t < count; t++)
    score_latents<HEADS, 1>(of_heads, pass.apart, latents + t * rank, rank, scores + t, pass.stride);
}

// Add what HEADS heads from `head` on mix of the latents of block b.
template <int HEADS, typename T>
void mix_block(const LatentPass<T>& pass, int64_t b, int64_t head) {
  const int64_t rank = pass.step.value_dim;
  const T* latents = pass.latents_of(b);
  multiply_block<HEADS, true>(pass.scores + head * pass.stride + b * pass.step.block, pass.stride, latents, latents,
                              rank, rank, pass.filled(b), pass.mixed + head * pass.apart, pass.apart);
}

// `heads` heads of one sample: query [heads, rank], turned [heads, dim] -> out [heads, rank]. A block stays in
// the processor's cache while all heads read it.
template <typename T>
void attend_latent_heads(const DecodeStep& step, const T* keys, const T* latents, int64_t row, int64_t heads,
                         const T* query, const T* turned, T* out) {
  thread_local std::vector<float> scratch;
  const int64_t rank = step.value_dim, dim = step.dim, count = step.positions[row] + 1;
  const int64_t blocks = (count + step.block - 1) / step.block;
  const int64_t stride = padded(count + step.block) + WIDTH, apart = padded(rank);
  // Heads that are missing to a full register tile are queries of zero: another tile rounds otherwise.
  const int64_t tiled = (heads + MAX_HEADS - 1) / MAX_HEADS * MAX_HEADS;
  scratch.assign(tiled * (stride + 2 * apart + dim) + WIDTH, 0.0f);
  float *scores = scratch.data(), *mixed = scores + tiled * stride, *queries = mixed + tiled * apart;
  float* turns = queries + tiled * apart;
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t i = 0; i < rank; i += WIDTH) store(queries + h * apart + i, load(query + h * rank + i, rank - i));
    for (int64_t i = 0; i < dim; i++) turns[h * dim + i] = value(turned[h * dim + i]);
  }
  const LatentPass<T> pass{step, keys, latents, step.table + row * step.table_width, count, stride, apart, scores, mixed};
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t h = 0; h < tiled; h += MAX_HEADS) score_block<MAX_HEADS>(pass, b, h, queries, turns);
  std::vector<float> totals(heads);
  for (int64_t h = 0; h < heads; h++) totals[h] = soften(scores + h * stride, count, step.scale);
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t h = 0; h < tiled; h += MAX_HEADS) mix_block<MAX_HEADS>(pass, b, h);
  for (int64_t h = 0; h < heads; h++)
    for (int64_t i = 0; i < rank; i += WIDTH)
      store(out + h * rank + i, load(mixed + h * apart + i) / totals[h], rank - i);
}

// query [rows, heads, value dim] in the latent space, turned [rows, heads, dim] -> out [rows, heads, value dim].
// The new tokens are in the cache already.
template <typename T>
void attend_latent(const DecodeStep* step, const T* keys, const T* latents, const T* query, const T* turned, T* out) {
  const int64_t heads = step->per_group, rank = step->value_dim, dim = step->dim;
#pragma omp parallel for num_threads(step->threads) schedule(dynamic) collapse(2)
  for (int64_t first = 0; first < heads; first += LATENT_HEADS)
    for (int64_t row = 0; row < step->rows; row++) {
      const int64_t head = row * heads + first;
      attend_latent_heads(*step, keys, latents, row, std::min<int64_t>(heads - first, LATENT_HEADS),
                          query + head * rank, turned + head * dim, out + head * rank);
    }
}

// -- sampling tokens ----------------------------------------------------------------------------

// Where the running sum of weights passes `target`, never one of weight zero; and what is left.
template <typename Weight>
int64_t search(const Weight& weight_of, int64_t count, double& target) {
  int64_t found = 0;
  double running = 0, before = 0;
  for (int64_t i = 0; i < count; i++) {
    const double weight = weight_of(i);
    if (weight <= 0) continue;
    found = i, before = running;
    running += weight;
    if (running > target) break;
  }
  target = std::max(0.0, target - before);
  return found;
}

template <typename T>
void sample_row(const T* logits, int64_t size, float uniform, float temperature, int64_t* token,
              float* logprob) {
  thread_local std::vector<float> sums;
  sums.assign((size + SUM_BLOCK - 1) / SUM_BLOCK, 0.0f);
  Floats top = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) top = larger(top, load(logits + i));
  float highest = largest(top);
  for (; i < size; i++) highest = std::max(highest, value(logits[i]));
  const float scale = 1.0f / temperature;
  const auto weights = [&](int64_t at) {
    Floats weight = exponential((load(logits + at, size - at) - highest) * scale);
    for (int64_t lane = size - at; lane < WIDTH; lane++) weight[lane] = 0;
    return weight;
  };
  double total = 0;
  for (size_t block = 0; block < sums.size(); block++) {
    const int64_t first = block * SUM_BLOCK, last = std::min(size, first + SUM_BLOCK);
    Floats sum_of_block = {};
    for (int64_t at = first; at < last; at += WIDTH) sum_of_block += weights(at);
    total += sums[block] = sum(sum_of_block);
  }
  double target = uniform * total;
  const int64_t first = search([&](int64_t at) { return sums[at]; }, sums.size(), target) * SUM_BLOCK;
  float inside[SUM_BLOCK];
  const int64_t count = std::min<int64_t>(SUM_BLOCK, size - first);
  for (int64_t at = 0; at < count; at += WIDTH) store(inside + at, weights(first + at));
  *token = first + search([&](int64_t at) { return inside[at]; }, count, target);
  *logprob = (value(logits[*token]) - highest) * scale - std::log(total);
}

template <typename T>
void sample(const T* logits, const float* uniform, int64_t rows, int64_t size, float temperature,
          int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t row = 0; row < rows; row++)
    sample_row(logits + row * size, size, uniform[row], temperature, tokens + row, logprobs + row);
}

}  // namespace

#define EXPORT(T)                                                                                         \
  extern "C" void add_norm_##T(T* hidden, const T* delta, const T* weight, T* out, int64_t rows,          \
                               int64_t width, float eps, int threads) {                                   \
    add_norm(hidden, delta, weight, out, rows, width, eps, threads);                                      \
  }                                                                                                       \
  extern "C" void silu_mul_##T(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {      \
    silu_mul(gate_up, out, rows, width, threads);                                                         \
  }                                                                                                       \
  extern "C" void experts_##T(const ExpertsOfLayer* layer, const T* x, const int64_t* ids,                \
                              const float* weights, const T* gate_up, const T* down, T* out) {            \
    experts(layer, x, ids, weights, gate_up, down, out);                                                  \
  }                                                                                                       \
  extern "C" void attend_##T(const DecodeStep* step, T* keys, T* values, T* qkv, const T* q_norm,               \
                             const T* k_norm, T* out) {                                                   \
    attend(step, keys, values, qkv, q_norm, k_norm, out);                                                 \
  }                                                                                                       \
  extern "C" void attend_latent_##T(const DecodeStep* step, const T* keys, const T* latents, const T* query, \
                                    const T* turned, T* out) {                                            \
    attend_latent(step, keys, latents, query, turned, out);                                               \
  }                                                                                                       \
  extern "C" void sample_##T(const T* logits, const float* uniform, int64_t rows, int64_t size,             \
                           float temperature, int64_t* tokens, float* logprobs, int threads) {            \
    sample(logits, uniform, rows, size, temperature, tokens, logprobs, threads);                            \
  }

EXPORT(float)
EXPORT(bf16)
