// Causal attention over the segments of a packed batch, forward and backward, in one pass over blocks of
// keys (FlashAttention-2, Dao 2023, algorithms 1 and 2).
//
// Scores of a block of queries with a block of keys stay in the processor's cache; no mask is stored. A
// row is one query of one head; the heads that share a kv head are neighbours, so that a block of keys
// serves all of them. Everything is computed in fp32 and rounded once. Sums have a fixed order: a result
// does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 48;  // of a block of queries: with a block of keys and the scores it fits in L1
constexpr int64_t KEYS = 64;  // of a block of keys
constexpr int64_t TASK_ROWS = 16 * ROWS;  // of a forward task, which repacks its keys
constexpr int TILE_ROWS = 6;  // of a product, whose sums stay in registers with
#ifdef __AVX512F__
constexpr int TILE_VECTORS = 4;  // vectors of columns: 24 of 32 registers
#else
constexpr int TILE_VECTORS = 2;  // 12 of 16
#endif

// A packed batch: [tokens, heads, dim], rows of a head contiguous. Mirrored in attention_kernels.py.
struct Batch {
  int64_t segments, heads, kv_heads, dim, value_dim, key_tokens;
  int64_t query_stride, key_stride, value_stride;  // from a token to the next
  int64_t threads;
  float scale;
  const int64_t *query_ends, *key_ends;  // [segments], cumulative lengths
  const int64_t* key_rows;  // [keys of all segments]; null: keys lie as queries do
};

// -- products of blocks -------------------------------------------------------------------------

// A matrix whose elements are `row` and `column` apart: a transposed one swaps them.
struct Factors {
  const float* at;
  int64_t row, column;
};

// c[i][j] (ADD: +=) the sum over k of a(i, k) * b[k][j], for COUNT rows and VECTORS vectors of columns.
template <int COUNT, int VECTORS, bool ADD>
inline void multiply_tile(Factors a, const float* b, int64_t b_row, int64_t inner, float* c, int64_t c_row) {
  Floats sums[COUNT][VECTORS] = {};
  for (int i = 0; ADD && i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = load(c + i * c_row + v * WIDTH);
  for (int64_t k = 0; k < inner; k++) {
    Floats x[VECTORS];
    for (int v = 0; v < VECTORS; v++) x[v] = load(b + k * b_row + v * WIDTH);
    for (int i = 0; i < COUNT; i++) {
      const float factor = a.at[i * a.row + k * a.column];
      for (int v = 0; v < VECTORS; v++) sums[i][v] += factor * x[v];
    }
  }
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) store(c + i * c_row + v * WIDTH, sums[i][v]);
}

// The same for any number of rows; what is left of a tile is done row by row.
template <int VECTORS, bool ADD>
void multiply_columns(int64_t rows, Factors a, const float* b, int64_t b_row, int64_t inner, float* c,
                      int64_t c_row) {
  int64_t i = 0;
  const auto run = [&](auto tile, int64_t count) {
    for (; i + count <= rows; i += count)
      tile(Factors{a.at + i * a.row, a.row, a.column}, b, b_row, inner, c + i * c_row, c_row);
  };
  run(multiply_tile<TILE_ROWS, VECTORS, ADD>, TILE_ROWS);
  run(multiply_tile<2, VECTORS, ADD>, 2);
  run(multiply_tile<1, VECTORS, ADD>, 1);
}

// The same for any number of columns; those up to the end of a vector are computed, too.
template <bool ADD>
void multiply(int64_t rows, int64_t columns, int64_t inner, Factors a, const float* b, int64_t b_row, float* c,
              int64_t c_row) {
  int64_t j = 0;
  for (; j + TILE_VECTORS * WIDTH <= padded(columns); j += TILE_VECTORS * WIDTH)
    multiply_columns<TILE_VECTORS, ADD>(rows, a, b + j, b_row, inner, c + j, c_row);
  for (; j < columns; j += WIDTH) multiply_columns<1, ADD>(rows, a, b + j, b_row, inner, c + j, c_row);
}

// -- packing ------------------------------------------------------------------------------------

// One segment as one kv head sees it.
struct Segment {
  const Batch& batch;
  int64_t head, first_query, queries, first_key, keys;

  Segment(const Batch& batch, int64_t number, int64_t head) : batch(batch), head(head) {
    first_query = number ? batch.query_ends[number - 1] : 0;
    first_key = number ? batch.key_ends[number - 1] : 0;
    queries = batch.query_ends[number] - first_query;
    keys = batch.key_ends[number] - first_key;
  }
  int64_t group() const { return batch.heads / batch.kv_heads; }
  int64_t rows() const { return queries * group(); }
  int64_t query_of(int64_t row) const { return first_query + row / group(); }
  int64_t head_of(int64_t row) const { return head * group() + row % group(); }
  int64_t key_row(int64_t key) const {
    return batch.key_rows ? batch.key_rows[first_key + key] : first_key + key;
  }
  // Keys that a row sees: all before the segment's own, and those up to itself.
  int64_t seen(int64_t row) const { return keys - queries + row / group() + 1; }
  int64_t blocks() const { return (keys + KEYS - 1) / KEYS; }
  int64_t blocks_seen(int64_t last_row) const { return (seen(last_row) + KEYS - 1) / KEYS; }
  int64_t keys_of(int64_t block) const { return std::min(KEYS, keys - block * KEYS); }
};

// Rows of `wide` floats, zero behind the end of each.
template <typename T>
void unpack_row(const T* from, int64_t width, float factor, float* to) {
  for (int64_t i = 0; i < width; i += WIDTH) store(to + i, load(from + i, width - i) * factor);
}

// Keys or values of a segment, one below the other: [keys, padded(dim)].
template <typename T>
void pack(const Segment& segment, const T* x, int64_t stride, int64_t dim, float* to) {
  for (int64_t key = 0; key < segment.keys; key++)
    unpack_row(x + segment.key_row(key) * stride + segment.head * dim, dim, 1.0f, to + key * padded(dim));
}

// Blocks of what `pack` gave, each [dim, KEYS]; zero where a block has no key.
void transpose(const Segment& segment, const float* packed, int64_t dim, float* to) {
  for (int64_t block = 0; block < segment.blocks(); block++) {
    const int64_t count = segment.keys_of(block);
    float* at = to + block * dim * KEYS;
    const float* from = packed + block * KEYS * padded(dim);
    for (int64_t d = 0; d < dim; d++)
      for (int64_t key = 0; key < KEYS; key++) at[d * KEYS + key] = key < count ? from[key * padded(dim) + d] : 0.0f;
  }
}

// Rows [first, first + count) of queries or of what is laid like them: [count, padded(dim)].
template <typename T>
void pack_rows(const Segment& segment, const T* x, int64_t stride, int64_t dim, int64_t first, int64_t count,
               float factor, float* to) {
  for (int64_t r = 0; r < count; r++)
    unpack_row(x + segment.query_of(first + r) * stride + segment.head_of(first + r) * dim, dim, factor,
               to + r * padded(dim));
}

// Scratch of one thread, cut into pieces.
struct Scratch {
  std::vector<float> memory;
  int64_t used = 0;

  void begin(int64_t floats) {
    used = 0;
    if ((int64_t)memory.size() < floats) memory.resize(floats);
  }
  float* take(int64_t floats) {
    float* piece = memory.data() + used;
    used += floats;
    return piece;
  }
};

// -- forward ------------------------------------------------------------------------------------

// Softmax of a row that grows block by block: its largest score, and the sum of weights relative to it.
struct Running {
  float top = -INFINITY, total = 0;
};

// Turn a row's scores with one block into weights, zero for keys that it does not see; rescale what was mixed
// before.
void soften(float* scores, int64_t seen, Running& row, float* mixed, int64_t wide) {
  for (int64_t i = std::max<int64_t>(seen, 0); i < KEYS; i++) scores[i] = -INFINITY;
  Floats tops = Floats{} + row.top;
  for (int64_t i = 0; i < KEYS; i += WIDTH) tops = larger(tops, load(scores + i));
  const float top = largest(tops);
  Floats total = {};
  for (int64_t i = 0; i < KEYS; i += WIDTH) {
    const Floats weights = exponential(load(scores + i) - top);
    total += weights;
    store(scores + i, weights);
  }
  const float shrink = row.top == -INFINITY ? 0.0f : std::exp(row.top - top);
  row.total = row.total * shrink + sum(total);
  row.top = top;
  if (shrink == 1.0f) return;
  for (int64_t i = 0; i < wide; i += WIDTH) store(mixed + i, load(mixed + i) * shrink);
}

// Rows [first, last) of a segment: out [tokens, heads, value dim], and log-sum-exp of scores [tokens, heads].
template <typename T>
void attend_rows(const Segment& segment, const T* query, const T* key, const T* value, int64_t first, int64_t last,
                 T* out, float* normaliser) {
  thread_local Scratch scratch;
  const Batch& batch = segment.batch;
  const int64_t dim = batch.dim, wide = padded(dim), value_dim = batch.value_dim, value_wide = padded(value_dim);
  const int64_t blocks = segment.blocks();
  scratch.begin(blocks * KEYS * (wide + dim + value_wide) + ROWS * (wide + KEYS + value_wide));
  float* packed = scratch.take(blocks * KEYS * wide);
  float* keys = scratch.take(blocks * KEYS * dim);
  float* values = scratch.take(blocks * KEYS * value_wide);
  float* queries = scratch.take(ROWS * wide);
  float* scores = scratch.take(ROWS * KEYS);
  float* mixed = scratch.take(ROWS * value_wide);
  pack(segment, key, batch.key_stride, dim, packed);
  transpose(segment, packed, dim, keys);
  pack(segment, value, batch.value_stride, value_dim, values);
  for (int64_t begin = first; begin < last; begin += ROWS) {
    const int64_t count = std::min(ROWS, last - begin);
    Running running[ROWS];
    std::fill_n(mixed, count * value_wide, 0.0f);
    pack_rows(segment, query, batch.query_stride, dim, begin, count, batch.scale, queries);
    for (int64_t b = 0; b < segment.blocks_seen(begin + count - 1); b++) {
      multiply<false>(count, KEYS, dim, {queries, wide, 1}, keys + b * dim * KEYS, KEYS, scores, KEYS);
      for (int64_t r = 0; r < count; r++)
        soften(scores + r * KEYS, std::min(KEYS, segment.seen(begin + r) - b * KEYS), running[r],
               mixed + r * value_wide, value_wide);
      multiply<true>(count, value_dim, segment.keys_of(b), {scores, KEYS, 1}, values + b * KEYS * value_wide,
                     value_wide, mixed, value_wide);
    }
    for (int64_t r = 0; r < count; r++) {
      const int64_t at = segment.query_of(begin + r) * batch.heads + segment.head_of(begin + r);
      normaliser[at] = running[r].top + std::log(running[r].total);
      for (int64_t d = 0; d < value_dim; d += WIDTH)
        store(out + at * value_dim + d, load(mixed + r * value_wide + d) / running[r].total, value_dim - d);
    }
  }
}

struct Task {
  int64_t segment, head, first;
};

template <typename T>
void attend(const Batch* batch, const T* query, const T* key, const T* value, T* out, float* normaliser) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < batch->segments; s++)
    for (int64_t head = 0; head < batch->kv_heads; head++)
      for (int64_t first = 0; first < Segment(*batch, s, head).rows(); first += TASK_ROWS)
        tasks.push_back({s, head, first});
  const int64_t count = tasks.size();
#pragma omp parallel for num_threads(batch->threads) schedule(dynamic)
  for (int64_t t = 0; t < count; t++) {
    const Segment segment(*batch, tasks[t].segment, tasks[t].head);
    const int64_t last = std::min(segment.rows(), tasks[t].first + TASK_ROWS);
    attend_rows(segment, query, key, value, tasks[t].first, last, out, normaliser);
  }
}

// -- backward -----------------------------------------------------------------------------------

// What the backward pass reads and writes; [tokens, heads, ...] without gaps but for query, key, value.
template <typename T>
struct Gradients {
  const T *query, *key, *value, *out, *grad_out;
  const float* normaliser;
  T* grad_query;
  float *grad_key, *grad_value;  // fp32: segments that share keys add to them
};

// Weights of a row with one block again, from its scores, and the gradient of the scores from that of the
// weights: p = exp(s - normaliser), ds = p (dp - sum of out * grad_out).
void backward_row(float* scores, float* grads, int64_t seen, float normaliser, float dot) {
  for (int64_t i = std::max<int64_t>(seen, 0); i < KEYS; i++) scores[i] = -INFINITY;
  for (int64_t i = 0; i < KEYS; i += WIDTH) {
    const Floats weights = exponential(load(scores + i) - normaliser);
    store(scores + i, weights);
    store(grads + i, weights * (load(grads + i) - dot));
  }
}

template <typename T>
float dot_product(const T* a, const T* b, int64_t width) {
  Floats total = {};
  for (int64_t i = 0; i < width; i += WIDTH) total += load(a + i, width - i) * load(b + i, width - i);
  return sum(total);
}

// Add a segment's own sums [keys, wide] to the rows of its keys [key tokens, kv heads, dim].
void scatter(const Segment& segment, const float* sums, int64_t dim, float* to) {
  for (int64_t key = 0; key < segment.keys; key++) {
    float* row = to + (segment.key_row(key) * segment.batch.kv_heads + segment.head) * dim;
    for (int64_t i = 0; i < dim; i++) row[i] += sums[key * padded(dim) + i];
  }
}

// One segment and kv head.
template <typename T>
void backward_segment(const Segment& segment, const Gradients<T>& x) {
  thread_local Scratch scratch;
  const Batch& batch = segment.batch;
  const int64_t dim = batch.dim, wide = padded(dim), value_dim = batch.value_dim, value_wide = padded(value_dim);
  const int64_t spread = segment.blocks() * KEYS;
  scratch.begin(spread * (2 * wide + dim + 2 * value_wide + value_dim) + ROWS * (2 * wide + value_wide + 2 * KEYS));
  float *keys = scratch.take(spread * wide), *keys_across = scratch.take(spread * dim);
  float *values = scratch.take(spread * value_wide), *values_across = scratch.take(spread * value_dim);
  float *grad_keys = scratch.take(spread * wide), *grad_values = scratch.take(spread * value_wide);
  float *queries = scratch.take(ROWS * wide), *grad_queries = scratch.take(ROWS * wide);
  float *grad_outs = scratch.take(ROWS * value_wide);
  float *scores = scratch.take(ROWS * KEYS), *grads = scratch.take(ROWS * KEYS);
  pack(segment, x.key, batch.key_stride, dim, keys);
  transpose(segment, keys, dim, keys_across);
  pack(segment, x.value, batch.value_stride, value_dim, values);
  transpose(segment, values, value_dim, values_across);
  std::fill_n(grad_keys, spread * wide, 0.0f);
  std::fill_n(grad_values, spread * value_wide, 0.0f);
  for (int64_t begin = 0; begin < segment.rows(); begin += ROWS) {
    const int64_t count = std::min(ROWS, segment.rows() - begin);
    float dots[ROWS];
    std::fill_n(grad_queries, count * wide, 0.0f);
    pack_rows(segment, x.query, batch.query_stride, dim, begin, count, batch.scale, queries);
    pack_rows(segment, x.grad_out, batch.heads * value_dim, value_dim, begin, count, 1.0f, grad_outs);
    const auto place = [&](int64_t r) { return segment.query_of(begin + r) * batch.heads + segment.head_of(begin + r); };
    for (int64_t r = 0; r < count; r++)
      dots[r] = dot_product(x.out + place(r) * value_dim, x.grad_out + place(r) * value_dim, value_dim);
    for (int64_t b = 0; b < segment.blocks_seen(begin + count - 1); b++) {
      const int64_t held = segment.keys_of(b), from = b * KEYS;
      multiply<false>(count, KEYS, dim, {queries, wide, 1}, keys_across + from * dim, KEYS, scores, KEYS);
      multiply<false>(count, KEYS, value_dim, {grad_outs, value_wide, 1}, values_across + from * value_dim, KEYS,
                      grads, KEYS);
      for (int64_t r = 0; r < count; r++)
        backward_row(scores + r * KEYS, grads + r * KEYS, std::min(KEYS, segment.seen(begin + r) - from),
                     x.normaliser[place(r)], dots[r]);
      multiply<true>(count, dim, held, {grads, KEYS, 1}, keys + from * wide, wide, grad_queries, wide);
      multiply<true>(held, dim, count, {grads, 1, KEYS}, queries, wide, grad_keys + from * wide, wide);
      multiply<true>(held, value_dim, count, {scores, 1, KEYS}, grad_outs, value_wide,
                     grad_values + from * value_wide, value_wide);
    }
    for (int64_t r = 0; r < count; r++)
      for (int64_t d = 0; d < dim; d += WIDTH)
        store(x.grad_query + place(r) * dim + d, load(grad_queries + r * wide + d) * batch.scale, dim - d);
  }
  scatter(segment, grad_keys, dim, x.grad_key);
  scatter(segment, grad_values, value_dim, x.grad_value);
}

// Segments by family: those that share keys, directly or by others, add to the same gradients.
std::vector<std::vector<int64_t>> families(const Batch& batch) {
  std::vector<int64_t> family_of_row(batch.key_tokens, -1);
  std::vector<std::vector<int64_t>> found(batch.segments);
  std::vector<int64_t> joined(batch.segments);  // the family that one was taken into, or itself
  for (int64_t s = 0; s < batch.segments; s++) {
    joined[s] = s;
    const Segment segment(batch, s, 0);
    for (int64_t key = 0; key < segment.keys; key++) {
      int64_t& family = family_of_row[segment.key_row(key)];
      if (family < 0) family = s;
      while (family != joined[family]) family = joined[family];
      joined[std::max(family, joined[s])] = std::min(family, joined[s]);
      joined[s] = family = std::min(family, joined[s]);
    }
  }
  for (int64_t s = 0; s < batch.segments; s++) {
    int64_t family = s;
    while (family != joined[family]) family = joined[family];
    found[family].push_back(s);
  }
  return found;
}

template <typename T>
void attend_backward(const Batch* batch, const T* query, const T* key, const T* value, const T* out,
                     const T* grad_out, const float* normaliser, T* grad_query, float* grad_key, float* grad_value) {
  const Gradients<T> x{query, key, value, out, grad_out, normaliser, grad_query, grad_key, grad_value};
  const auto found = families(*batch);
  // A family's segments follow each other: the order of sums is that of the batch.
#pragma omp parallel for num_threads(batch->threads) schedule(dynamic) collapse(2)
  for (int64_t family = 0; family < batch->segments; family++)
    for (int64_t head = 0; head < batch->kv_heads; head++)
      for (const int64_t segment : found[family]) backward_segment(Segment(*batch, segment, head), x);
}

}  // namespace

#define EXPORT(T)                                                                                              \
  extern "C" void attend_##T(const Batch* batch, const T* query, const T* key, const T* value, T* out,         \
                             float* normaliser) {                                                              \
    attend(batch, query, key, value, out, normaliser);                                                         \
  }                                                                                                            \
  extern "C" void attend_backward_##T(const Batch* batch, const T* query, const T* key, const T* value,        \
                                      const T* out, const T* grad_out, const float* normaliser, T* grad_query, \
                                      float* grad_key, float* grad_value) {                                    \
    attend_backward(batch, query, key, value, out, grad_out, normaliser, grad_query, grad_key, grad_value);    \
  }

EXPORT(float)
EXPORT(bf16)
