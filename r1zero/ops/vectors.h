// Vectors of floats, and rows of float or bf16 read and written by them.
//
// Vectors are the compiler's own, hence no instruction is named here, only how wide a register is.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;  // floats in a vector: those of a register
#else
constexpr int WIDTH = 8;  // compilers keep wider ones in memory: attention took 4 to 13 times as long
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "halves of a float are taken in this order");

struct bf16 {
  uint16_t bits;
};

// -- vectors ----------------------------------------------------------------------------------

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const bf16* from) {
  Halves high;  // a bf16 is the upper half of a float
  std::memcpy(&high, from, sizeof high);
  return (Floats)(__builtin_convertvector(high, Words) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline void store(bf16* to, Floats x) {
  const Words bits = (Words)x;
  const Words nearest_even = bits + 0x7fff + ((bits >> 16) & 1);
  const Words rounded_bits = x == x ? nearest_even : Words{} + 0x7fc00000;
  const Halves rounded = __builtin_convertvector(rounded_bits >> 16, Halves);
  std::memcpy(to, &rounded, sizeof rounded);
}

// The first `count` of a vector, the rest zero: for the end of a row. WHOLE: there is no such end here.
template <bool WHOLE = false, typename T>
inline Floats load(const T* from, int64_t count) {
  if (WHOLE || count >= WIDTH) return load(from);
  T padded[WIDTH] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* to, Floats x, int64_t count) {
  if (count >= WIDTH) return store(to, x);
  T padded[WIDTH];
  store(padded, x);
  std::memcpy(to, padded, count * sizeof(T));
}

// What is left of x once it was stored as T.
template <typename T>
inline Floats rounded(Floats x) {
  T stored[WIDTH];
  store(stored, x);
  return load(stored);
}

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += x[i];
  return total;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats x) {
  float top = x[0];
  for (int i = 1; i < WIDTH; i++) top = std::max(top, x[i]);
  return top;
}

// e^x within 3e-7, relative: 2^n times a polynomial of the rest. Below -87 it is zero, above 87 that of 87.
inline Floats exponential(Floats given) {
  const Floats limit = Floats{} + 87.0f;
  const Floats shift = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats x = given > limit ? limit : (given < -limit ? -limit : given);
  const Floats n = (x * 1.44269504f + shift) - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = Floats{} + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats power = p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return given < -limit ? Floats{} : power;
}

template <typename T>
inline float value(T x);
template <>
inline float value(float x) { return x; }
template <>
inline float value(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounded up to whole vectors.
inline int64_t padded(int64_t width) { return (width + WIDTH - 1) / WIDTH * WIDTH; }

}  // namespace
