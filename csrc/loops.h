// Loops of the CPU implementations: conversions and functions that the compiler vectorises.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

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

// e^x to 1 ulp; 0 below -87.3, infinite above 88.7. x = n ln 2 + r, then a Taylor series of r.
NVMM_INLINE float exponential(float x) {
  constexpr float to_integer = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x > 89.f ? 89.f : (x < -104.f ? -104.f : x);
  const float shifted = clamped * 1.44269504f + to_integer;
  const float n = shifted - to_integer;
  // ln 2 in two parts; n times the first is exact.
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.f / 5040;
  sum = sum * r + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.f;
  sum = sum * r + 1.f;
  // 2^n in two factors, for n = 128 and for results below the normal numbers.
  const int32_t power = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(to_integer);
  const int32_t half = power >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((power - half + 127) << 23);
  return sum * first * second;
}

// erf to 3 ulp: fitted polynomials of erf(x) / x in x^2 below 1 and of ln erfc from 1 to 4.
NVMM_INLINE float error_function(float x) {
  const float t = std::fabs(x), s = x * x;
  float small = -9.67359392e-6f;
  small = small * s + 1.12682581e-4f;
  small = small * s - 8.48439755e-4f;
  small = small * s + 5.22105349e-3f;
  small = small * s - 2.68654376e-2f;
  small = small * s + 1.12837829e-1f;
  small = small * s - 3.76126379e-1f;
  small = small * s + 1.12837923f;
  const float u = t > 4.f ? 4.f : t;
  float tail = 1.61404944e-6f;
  tail = tail * u - 4.55903937e-5f;
  tail = tail * u + 5.92767727e-4f;
  tail = tail * u - 4.74021444e-3f;
  tail = tail * u + 2.63646971e-2f;
  tail = tail * u - 1.09978214e-1f;
  tail = tail * u - 6.31937146e-1f;
  tail = tail * u - 1.13016665f;
  tail = tail * u + 3.03209089e-4f;
  return t < 1.f ? x * small : std::copysign(1.f - exponential(tail), x);
}

// What the formulas of the operations call, on this side.
struct Loops {
  NVMM_INLINE float exp(float x) { return exponential(x); }
  NVMM_INLINE float erf(float x) { return error_function(x); }
};

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
