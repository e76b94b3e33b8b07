// What a .cu file is written with: nvcc compiles it for GPUs, g++ for the simulator.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "formula.h"

#ifdef NVMM_SIMULATED
#include "simulator.h"
#else
#include <cuda_runtime.h>
#define NVMM_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char nvmm_shared[]; \
  type* name = reinterpret_cast<type*>(nvmm_shared)
#endif

namespace nvmm {

constexpr int warp = 32;

// V values that are moved by one load or store of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// The widest pack of T.
template <class T>
constexpr int wide = 16 / sizeof(T);

// V values, by as many loads as that takes.
template <int V, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  constexpr int part = V < wide<T> ? V : wide<T>;
#pragma unroll
  for (int first = 0; first < V; first += part) {
    const Pack<T, part> pack = *reinterpret_cast<const Pack<T, part>*>(from + first);
#pragma unroll
    for (int k = 0; k < part; ++k) to[first + k] = static_cast<float>(pack.values[k]);
  }
}

template <int V, class T>
__device__ __forceinline__ void store(const float (&from)[V], T* to) {
  constexpr int part = V < wide<T> ? V : wide<T>;
#pragma unroll
  for (int first = 0; first < V; first += part) {
    Pack<T, part> pack;
#pragma unroll
    for (int k = 0; k < part; ++k) pack.values[k] = static_cast<T>(from[first + k]);
    *reinterpret_cast<Pack<T, part>*>(to + first) = pack;
  }
}

// V values as they are, in one move.
template <int V, class T>
__device__ __forceinline__ void copy(const T* from, T* to) {
  *reinterpret_cast<Pack<T, V>*>(to) = *reinterpret_cast<const Pack<T, V>*>(from);
}

// What the formulas of the operations call, on this side.
struct Device {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ Normal normal(float x) {
    return {0.5f * (1.f + erff(x * 0.70710678f)), 0.39894228f * expf(-0.5f * x * x)};
  }
};

struct Sum {
  static constexpr float neutral = 0.f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Maximum {
  static constexpr float neutral = -INFINITY;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class Operation>
__device__ __forceinline__ float warp_reduce(float value, Operation operation) {
#pragma unroll
  for (int offset = warp / 2; offset; offset /= 2) {
    value = operation(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// `value` of all threads reduced, given to all of them. The block is whole warps; `scratch` holds
// 32 floats and may be used again at once.
template <class Operation>
__device__ __forceinline__ float block_reduce(float value, float* scratch, Operation operation) {
  const int lane = threadIdx.x % warp;
  value = warp_reduce(value, operation);
  if (lane == 0) scratch[threadIdx.x / warp] = value;
  __syncthreads();
  value = lane < blockDim.x / warp ? scratch[lane] : Operation::neutral;
  value = warp_reduce(value, operation);
  __syncthreads();
  return value;
}

constexpr int scratch_floats = 32;
constexpr int scratch_bytes = scratch_floats * sizeof(float);

}  // namespace nvmm
