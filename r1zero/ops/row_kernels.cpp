// What lies between the matrix products of a training step, forward and backward, each in one pass over its
// rows: RMSNorm, SwiGLU, RoPE, and the softmax over the vocabulary.
//
// Rows of float or bf16, computed in fp32 and rounded once. Rows are independent; sums over rows are taken
// block by block in a fixed order, so that nothing depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK_ROWS = 64;  // whose sums are added up at a time
constexpr int64_t SUM_COLUMNS = 1024;  // of the vocabulary, summed in fp32 before they are in double

// -- RMSNorm (Zhang & Sennrich 2019, eq. 4) -----------------------------------------------------

// out = x s weight with s = 1 / rms(x), which is kept. x, out [rows, width], scales [rows].
template <typename T>
void rms_norm(const T* x, const T* weight, T* out, float* scales, int64_t rows, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * width;
    Floats squares = {};
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Floats v = load(from + i, width - i);
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
    scales[row] = scale;
    for (int64_t i = 0; i < width; i += WIDTH)
      store(out + row * width + i, load(from + i, width - i) * scale * load(weight + i, width - i), width - i);
  }
}

// One row of the gradient: with h = grad * weight, dx = s h - x s^3 mean(h x). Adds grad * x s to `sums`.
template <typename T>
void rms_norm_backward_row(const T* x, const T* weight, const T* grad, float scale, T* grad_x, float* sums,
                           int64_t width) {
  Floats products = {};
  for (int64_t i = 0; i < width; i += WIDTH) {
    const Floats of_x = load(x + i, width - i), of_grad = load(grad + i, width - i);
    products += of_x * of_grad * load(weight + i, width - i);
    store(sums + i, load(sums + i) + of_grad * of_x * scale);
  }
  const float along = sum(products) / width * scale * scale * scale;
  for (int64_t i = 0; i < width; i += WIDTH) {
    const Floats of_grad = load(grad + i, width - i) * load(weight + i, width - i);
    store(grad_x + i, of_grad * scale - load(x + i, width - i) * along, width - i);
  }
}

// grad, grad_x [rows, width], grad_weight [width].
template <typename T>
void rms_norm_backward(const T* x, const T* weight, const T* grad, const float* scales, T* grad_x, T* grad_weight,
                       int64_t rows, int64_t width, int threads) {
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, wide = padded(width);
  std::vector<float> sums((blocks + 1) * wide, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t row = block * BLOCK_ROWS; row < std::min(rows, (block + 1) * BLOCK_ROWS); row++) {
      const int64_t at = row * width;
      rms_norm_backward_row(x + at, weight, grad + at, scales[row], grad_x + at, sums.data() + block * wide, width);
    }
  float* total = sums.data() + blocks * wide;
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t i = 0; i < width; i++) total[i] += sums[block * wide + i];
  for (int64_t i = 0; i < width; i += WIDTH) store(grad_weight + i, load(total + i), width - i);
}

// -- SwiGLU (Shazeer 2020) ----------------------------------------------------------------------

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// out [rows, width] = silu(gate) * up, of [rows, gate and up].
template <typename T>
void swiglu(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Floats g = load(gate + i, width - i);
      store(out + row * width + i, g * sigmoid(g) * load(up + i, width - i), width - i);
    }
  }
}

// With s = sigmoid(gate): d gate = grad up s (1 + gate (1 - s)), d up = grad gate s.
template <typename T>
void swiglu_backward(const T* gate_up, const T* grad, T* grad_gate_up, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    T* to = grad_gate_up + row * 2 * width;
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Floats g = load(gate + i, width - i), s = sigmoid(g);
      const Floats of_out = load(grad + row * width + i, width - i);
      store(to + i, of_out * load(up + i, width - i) * s * (1.0f + g * (1.0f - s)), width - i);
      store(to + width + i, of_out * g * s, width - i);
    }
  }
}

// -- RoPE (Su et al. 2021, eq. 34) --------------------------------------------------------------

// Halves (a, b) of each head to (a cos - b sin, b cos + a sin); BACK: the other way, which is the gradient.
// x [tokens, heads, 2 half] with `stride` from token to token, out without gaps, cos and sin [tokens, 2 half].
template <bool BACK, typename T>
void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads, int64_t half,
            int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    const T *c = cos + token * 2 * half, *s = sin + token * 2 * half;
    for (int64_t head = 0; head < heads; head++) {
      const T* from = x + token * stride + head * 2 * half;
      T* to = out + (token * heads + head) * 2 * half;
      for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t left = half - i;
        const Floats a = load(from + i, left), b = load(from + half + i, left);
        const Floats sin_a = load(s + i, left), sin_b = load(s + half + i, left);
        const Floats turned_a = BACK ? b * sin_b : -b * sin_a, turned_b = BACK ? -a * sin_a : a * sin_b;
        store(to + i, a * load(c + i, left) + turned_a, left);
        store(to + half + i, b * load(c + half + i, left) + turned_b, left);
      }
    }
  }
}

// -- softmax over the vocabulary ----------------------------------------------------------------

// Sums over one row of logits, all relative to the largest: see vocab.py's Sums.
template <typename T>
void softmax_row(const T* logits, int64_t columns, float scale, float* top, float* total, float* weighted) {
  Floats tops = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + WIDTH <= columns; i += WIDTH) tops = larger(tops, load(logits + i));
  float highest = largest(tops);
  for (; i < columns; i++) highest = std::max(highest, value(logits[i]));
  double weights_sum = 0, weighted_sum = 0;
  for (int64_t first = 0; first < columns; first += SUM_COLUMNS) {
    Floats weights = {}, products = {};
    for (i = first; i < std::min(columns, first + SUM_COLUMNS); i += WIDTH) {
      const Floats x = (load(logits + i, columns - i) - highest) * scale;
      Floats weight = exponential(x);
      for (int64_t lane = columns - i; lane < WIDTH; lane++) weight[lane] = 0;
      weights += weight;
      products += weight * x;
    }
    weights_sum += sum(weights);
    weighted_sum += sum(products);
  }
  *top = highest * scale;
  *total = weights_sum;
  *weighted = weighted_sum;
}

// logits [rows, columns], the others [rows].
template <typename T>
void softmax_sums(const T* logits, float scale, float* top, float* total, float* weighted, int64_t rows,
                  int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++)
    softmax_row(logits + row * columns, columns, scale, top + row, total + row, weighted + row);
}

// logits [rows, columns] become their gradient, from those of the log-prob and the entropy of each row: see
// vocab.py's logits_gradient_. `targets` -1: the target is another rank's.
template <typename T>
void softmax_gradient(T* logits, float scale, const int64_t* targets, const float* normaliser, const float* entropy,
                      const float* grad_logprob, const float* grad_entropy, int64_t rows, int64_t columns,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    T* x = logits + row * columns;
    const float of_logprob = grad_logprob[row] * scale, of_entropy = grad_entropy[row] * scale;
    const int64_t target = targets[row];
    const float logit = target < 0 ? 0.0f : value(x[target]);
    for (int64_t i = 0; i < columns; i += WIDTH) {
      const Floats logp = load(x + i, columns - i) * scale - normaliser[row];
      const Floats slope = of_entropy * (logp + entropy[row]) + of_logprob;
      store(x + i, -slope * exponential(logp), columns - i);
    }
    if (target < 0) continue;
    const float logp = logit * scale - normaliser[row];
    const float slope = of_entropy * (logp + entropy[row]) + of_logprob;
    const Floats at_target = Floats{} + (of_logprob - slope * exponential(Floats{} + logp)[0]);
    store(x + target, at_target, 1);
  }
}

}  // namespace

#define EXPORT(T)                                                                                                \
  extern "C" void rms_norm_##T(const T* x, const T* weight, T* out, float* scales, int64_t rows, int64_t width, \
                               float eps, int threads) {                                                         \
    rms_norm(x, weight, out, scales, rows, width, eps, threads);                                                 \
  }                                                                                                              \
  extern "C" void rms_norm_backward_##T(const T* x, const T* weight, const T* grad, const float* scales,        \
                                        T* grad_x, T* grad_weight, int64_t rows, int64_t width, int threads) {   \
    rms_norm_backward(x, weight, grad, scales, grad_x, grad_weight, rows, width, threads);                       \
  }                                                                                                              \
  extern "C" void swiglu_##T(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {               \
    swiglu(gate_up, out, rows, width, threads);                                                                  \
  }                                                                                                              \
  extern "C" void swiglu_backward_##T(const T* gate_up, const T* grad, T* grad_gate_up, int64_t rows,            \
                                      int64_t width, int threads) {                                              \
    swiglu_backward(gate_up, grad, grad_gate_up, rows, width, threads);                                          \
  }                                                                                                              \
  extern "C" void rotate_##T(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads,      \
                             int64_t half, int64_t stride, int threads) {                                        \
    rotate<false>(x, cos, sin, out, tokens, heads, half, stride, threads);                                       \
  }                                                                                                              \
  extern "C" void rotate_backward_##T(const T* x, const T* cos, const T* sin, T* out, int64_t tokens,            \
                                      int64_t heads, int64_t half, int64_t stride, int threads) {                \
    rotate<true>(x, cos, sin, out, tokens, heads, half, stride, threads);                                        \
  }                                                                                                              \
  extern "C" void softmax_sums_##T(const T* logits, float scale, float* top, float* total, float* weighted,      \
                                   int64_t rows, int64_t columns, int threads) {                                 \
    softmax_sums(logits, scale, top, total, weighted, rows, columns, threads);                                   \
  }                                                                                                              \
  extern "C" void softmax_gradient_##T(T* logits, float scale, const int64_t* targets, const float* normaliser,  \
                                       const float* entropy, const float* grad_logprob,                          \
                                       const float* grad_entropy, int64_t rows, int64_t columns, int threads) {  \
    softmax_gradient(logits, scale, targets, normaliser, entropy, grad_logprob, grad_entropy, rows, columns,     \
                     threads);                                                                                   \
  }

EXPORT(float)
EXPORT(bf16)
