// Loops of the CPU implementations: conversions and functions that the compiler vectorises.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "formula.h"
#include "tensors.h"

// One function for every x86-64: the loader picks the clone for the machine's vector width.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NVMM_LOOP \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NVMM_LOOP
#endif
#define NVMM_INLINE static inline __attribute__((always_inline))

namespace nvmm {

NVMM_INLINE float get(const float* p) { return *p; }

NVMM_INLINE float get(const c10::BFloat16* p) {
  return std::bit_cast<float>(static_cast<uint32_t>(p->x) << 16);
}

NVMM_INLINE void put(float value, float* p) { *p = value; }

// Round to nearest, ties to even; NaN stays NaN.
NVMM_INLINE void put(float value, c10::BFloat16* p) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  p->x = static_cast<uint16_t>((value != value ? 0x7fc00000u : rounded) >> 16);
}

// e^x to 1 ulp, to 8e-5 of itself if not full; 0 below -87.7, infinite above 88.4. x = n ln 2 + r,
// then a fitted polynomial of r.
template <bool full = true>
NVMM_INLINE float exponential(float x) {
  constexpr float to_integer = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x > 89.f ? 89.f : (x < -88.f ? -88.f : x);
  const float shifted = clamped * 1.44269504f + to_integer;
  const float n = shifted - to_integer;
  // ln 2 in two parts; n times the first is exact.
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum;
  if constexpr (full) {
    sum = 1.38145976e-3f;
    sum = sum * r + 8.36871099e-3f;
    sum = sum * r + 4.16683890e-2f;
    sum = sum * r + 1.66665211e-1f;
    sum = sum * r + 4.99999940e-1f;
    sum = sum * r + 1.f;
    sum = sum * r + 1.f;
  } else {
    sum = 1.65667429e-1f;
    sum = sum * r + 5.04968224e-1f;
    sum = sum * r + 1.00016452f;
    sum = sum * r + 9.99927930e-1f;
  }
  // 2^n, n from -127 (0) to 128 (infinity).
  const int32_t power = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(to_integer);
  return sum * std::bit_cast<float>((power + 127) << 23);
}

// P(X > z) / e^(-z^2 / 2) is fitted, for z >= 0, as a polynomial of u = 1 / (1 + k z), to 2e-8 of
// itself (4e-5 if not full): one exponential serves the tail and the density.
template <bool full>
NVMM_INLINE Normal normal_distribution(float x) {
  const float decay = exponential<full>(-0.5f * x * x);
  const float u = 1.f / (1.f + (full ? 0.345f : 0.37f) * std::fabs(x));
  float tail;
  if constexpr (full) {
    tail = -2.83817928e-2f;
    tail = tail * u + 1.45281181e-1f;
    tail = tail * u - 2.71171480e-1f;
    tail = tail * u + 1.87194869e-1f;
    tail = tail * u - 3.76004502e-2f;
    tail = tail * u + 1.11799091e-1f;
    tail = tail * u + 1.17238410e-1f;
    tail = tail * u + 1.38020873e-1f;
    tail = tail * u + 1.37619287e-1f;
  } else {
    tail = -9.03509840e-2f;
    tail = tail * u + 2.09930537e-1f;
    tail = tail * u + 7.61403990e-2f;
    tail = tail * u + 1.57375912e-1f;
    tail = tail * u + 1.46919729e-1f;
  }
  tail *= u * decay;
  return {x > 0.f ? 1.f - tail : tail, 0.39894228f * decay};
}

// What the formulas of the operations call, on this side, for results in T: bfloat16's 8 bits
// need no more than short polynomials.
template <class T>
struct Loops {
  static constexpr bool full = std::is_same_v<T, float>;
  NVMM_INLINE float exp(float x) { return exponential<full>(x); }
  NVMM_INLINE Normal normal(float x) { return normal_distribution<full>(x); }
};

// Columns that a loop takes at a time where it works on fp32 copies, which stay in the first cache.
// Without copies g++ leaves loops scalar that hold both bfloat16 and a comparison of floats.
constexpr int64_t columns_at_once = 256;

// to = x, or x + bias.
template <class T>
NVMM_INLINE void widen(const T* x, const T* bias, float* to, int64_t count) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = get(x + i) + get(bias + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = get(x + i);
  }
}

template <class T>
NVMM_INLINE void narrow(const float* from, T* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) put(from[i], to + i);
}

// to += from.
NVMM_INLINE void add_to(const float* from, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Rows that make a task worth a thread.
inline int64_t grain(int64_t width) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1));
}

// How many parts of the rows are summed apart: fixed, so that sums over rows do not depend on the
// number of threads.
inline int64_t parts_of(int64_t rows) { return std::clamp<int64_t>(rows / 8, 1, 64); }

// out = partial.sum(0), partial [parts, width] in fp32; uses its first row.
template <class T>
NVMM_LOOP void reduce_columns(float* partial, int64_t parts, int64_t width, T* out) {
  for (int64_t r = 1; r < parts; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) partial[i] += partial[r * width + i];
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) put(partial[i], out + i);
}

}  // namespace nvmm
