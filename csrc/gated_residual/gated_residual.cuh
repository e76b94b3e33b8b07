// residual + mask * g(gate) * (branch + bias), g the identity or tanh.
#pragma once

#include "device.h"

namespace nvmm {

struct GatedShape {
  int64_t rows, width;
  bool scalar, tanh;
};

template <class T>
__device__ __forceinline__ float gate_at(const T* gate, int64_t i, const GatedShape& shape) {
  const float a = static_cast<float>(gate[shape.scalar ? 0 : i]);
  return shape.tanh ? tanhf(a) : a;
}

template <class T, int V>
__global__ void gated_forward(const T* __restrict__ residual, const T* __restrict__ branch,
                              const T* __restrict__ bias, const T* __restrict__ gate,
                              const T* __restrict__ mask, T* __restrict__ y, GatedShape shape) {
  const int64_t first = int64_t{blockIdx.x} * shape.width;
  const float weight = mask ? static_cast<float>(mask[blockIdx.x]) : 1.f;
  for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
    float r[V], f[V], b[V] = {};
    load<V>(residual + first + i, r);
    load<V>(branch + first + i, f);
    if (bias) load<V>(bias + i, b);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      // A row of mask 0 keeps its residual whatever the branch holds.
      if (weight != 0.f) r[k] += weight * gate_at(gate, i + k, shape) * (f[k] + b[k]);
    }
    store<V>(r, y + first + i);
  }
}

// dbranch, and this block's sums over its rows of mask * dy * (branch + bias) and of mask * dy in
// partial[blockIdx.x][2][width].
template <class T, int V>
__global__ void gated_backward(const T* __restrict__ dy, const T* __restrict__ branch,
                               const T* __restrict__ bias, const T* __restrict__ gate,
                               const T* __restrict__ mask, T* __restrict__ dbranch,
                               float* __restrict__ partial, GatedShape shape) {
  partial += int64_t{2} * blockIdx.x * shape.width;
  for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
    float g[V], b[V] = {}, sum[V] = {}, level[V] = {};
    if (bias) load<V>(bias + i, b);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] = gate_at(gate, i + k, shape);
    for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x) {
      const float weight = mask ? static_cast<float>(mask[row]) : 1.f;
      float d[V], f[V];
      load<V>(dy + row * shape.width + i, d);
      load<V>(branch + row * shape.width + i, f);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        d[k] = weight != 0.f ? weight * d[k] : 0.f;
        if (weight != 0.f) sum[k] += d[k] * (f[k] + b[k]);
        level[k] += d[k];
        d[k] *= g[k];
      }
      store<V>(d, dbranch + row * shape.width + i);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      partial[i + k] = sum[k];
      partial[shape.width + i + k] = level[k];
    }
  }
}

}  // namespace nvmm
