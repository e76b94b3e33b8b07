// RMSNorm of rows whose columns are spread over ranks: sums of this rank's part, and what is done
// with the sums of all. One block for a row.
#pragma once

#include "device.h"
#include "joint_norm.h"

namespace nvmm {

// squares[row] = sum of x^2 over the real columns.
template <class T, int V>
__global__ void joint_squares_reduce(const T* __restrict__ x, float* __restrict__ squares,
                                     Share share) {
  NVMM_DYNAMIC_SHARED(float, scratch);
  x += int64_t{blockIdx.x} * share.width;
  float sum = 0.f;
  for (int64_t i = threadIdx.x * V; i < share.real; i += blockDim.x * V) {
    float a[V];
    load<V>(x + i, a);
#pragma unroll
    for (int k = 0; k < V; ++k) sum += a[k] * a[k];
  }
  sum = block_reduce(sum, scratch, Sum{});
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// y = x * scale[row] * weight; padding columns are 0.
template <class T, int V>
__global__ void joint_apply(const T* __restrict__ x, const T* __restrict__ weight,
                            const float* __restrict__ scale, T* __restrict__ y, Share share) {
  x += int64_t{blockIdx.x} * share.width;
  y += int64_t{blockIdx.x} * share.width;
  weight += share.first;
  const float factor = scale[blockIdx.x];
  for (int64_t i = threadIdx.x * V; i < share.width; i += blockDim.x * V) {
    float a[V] = {};
    if (i < share.real) {
      float w[V];
      load<V>(x + i, a);
      load<V>(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] *= factor * w[k];
    }
    store<V>(a, y + i);
  }
}

// dots[row] = sum of dy * weight * normed x, and this block's sums of dy * normed x over its rows in
// partial[blockIdx.x]. A block takes every gridDim.x-th row, a thread always the same columns.
template <class T, int V>
__global__ void joint_sums_reduce(const T* __restrict__ dy, const T* __restrict__ x,
                                  const T* __restrict__ weight, const float* __restrict__ scale,
                                  float* __restrict__ dots, float* __restrict__ partial,
                                  Share share) {
  NVMM_DYNAMIC_SHARED(float, scratch);
  partial += int64_t{blockIdx.x} * share.real;
  weight += share.first;
  for (int64_t i = threadIdx.x * V; i < share.real; i += blockDim.x * V) {
    for (int k = 0; k < V; ++k) partial[i + k] = 0.f;
  }
  for (int64_t row = blockIdx.x; row < share.rows; row += gridDim.x) {
    const float factor = scale[row];
    float dot = 0.f;
    for (int64_t i = threadIdx.x * V; i < share.real; i += blockDim.x * V) {
      float g[V], a[V], w[V];
      load<V>(dy + row * share.width + i, g);
      load<V>(x + row * share.width + i, a);
      load<V>(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        g[k] *= a[k] * factor;
        dot += g[k] * w[k];
        partial[i + k] += g[k];
      }
    }
    dot = block_reduce(dot, scratch, Sum{});
    if (threadIdx.x == 0) dots[row] = dot;
  }
}

// dx = scale * (dy * weight - normed x * dots), dots divided by the length of the whole row.
template <class T, int V>
__global__ void joint_backward(const T* __restrict__ dy, const T* __restrict__ x,
                               const T* __restrict__ weight, const float* __restrict__ scale,
                               const float* __restrict__ dots, T* __restrict__ dx, Share share) {
  const int64_t first = int64_t{blockIdx.x} * share.width;
  weight += share.first;
  const float factor = scale[blockIdx.x], along = factor * dots[blockIdx.x];
  for (int64_t i = threadIdx.x * V; i < share.width; i += blockDim.x * V) {
    float g[V] = {};
    if (i < share.real) {
      float a[V], w[V];
      load<V>(dy + first + i, g);
      load<V>(x + first + i, a);
      load<V>(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) g[k] = factor * (g[k] * w[k] - a[k] * along);
    }
    store<V>(g, dx + first + i);
  }
}

}  // namespace nvmm
