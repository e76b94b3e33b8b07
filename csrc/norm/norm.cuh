// RMSNorm and LayerNorm over the last axis, forward and backward. One block for a row.
#pragma once

#include "device.h"

namespace nvmm {

struct NormShape {
  int64_t rows, width;
  float eps;
  float offset;  // added to the weight: 1 where gamma - 1 is stored
};

// h = x + residual in T, written to `sum`; y = (h - mean) * rstd * (weight + offset) + bias.
// Without residual h is x; RMSNorm has no mean. The row is read again for each pass, from cache.
template <class T, int V, bool rms>
__global__ void norm_forward(
    const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,
    const T* __restrict__ bias, T* sum, T* __restrict__ y, float* __restrict__ mean,
    float* __restrict__ rstd, NormShape shape) {
  NVMM_DYNAMIC_SHARED(float, scratch);
  const int64_t row = blockIdx.x;
  const int64_t first = row * shape.width;
  const T* h = residual ? sum + first : x + first;
  float total = 0.f;
  for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
    float a[V];
    load<V>(x + first + i, a);
    if (residual) {
      float b[V];
      load<V>(residual + first + i, b);
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] = static_cast<float>(static_cast<T>(a[k] + b[k]));
      store<V>(a, sum + first + i);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) total += rms ? a[k] * a[k] : a[k];
  }
  total = block_reduce(total, scratch, Sum{}) / shape.width;
  const float center = rms ? 0.f : total;
  if (!rms) {
    float squares = 0.f;
    for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
      float a[V];
      load<V>(h + i, a);
#pragma unroll
      for (int k = 0; k < V; ++k) squares += (a[k] - center) * (a[k] - center);
    }
    total = block_reduce(squares, scratch, Sum{}) / shape.width;
  }
  const float scale = rsqrtf(total + shape.eps);
  if (threadIdx.x == 0) {
    rstd[row] = scale;
    if (!rms) mean[row] = center;
  }
  for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
    float a[V], w[V];
    load<V>(h + i, a);
    load<V>(weight + i, w);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] = (a[k] - center) * scale * (w[k] + shape.offset);
    if (bias) {
      float b[V];
      load<V>(bias + i, b);
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] += b[k];
    }
    store<V>(a, y + first + i);
  }
}

// dx of every row (+ dsum, what flows into h beside y), and this block's sums of dy * normed h and
// of dy in partial[blockIdx.x][2][width]. A block takes every gridDim.x-th row; a thread always has
// the same columns, so the sums need no atomics.
template <class T, int V, bool rms>
__global__ void norm_backward(
    const T* __restrict__ dy, const T* __restrict__ dsum, const T* __restrict__ h,
    const T* __restrict__ weight, const float* __restrict__ mean, const float* __restrict__ rstd,
    T* __restrict__ dx, float* __restrict__ partial, NormShape shape) {
  NVMM_DYNAMIC_SHARED(float, scratch);
  float* dweight = partial + int64_t{2} * blockIdx.x * shape.width;
  float* dbias = dweight + shape.width;
  for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
    for (int k = 0; k < V; ++k) dweight[i + k] = dbias[i + k] = 0.f;
  }
  for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x) {
    const int64_t first = row * shape.width;
    const float center = rms ? 0.f : mean[row];
    const float scale = rstd[row];
    float along = 0.f, level = 0.f;
    for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
      float g[V], a[V], w[V];
      load<V>(dy + first + i, g);
      load<V>(h + first + i, a);
      load<V>(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float weighted = g[k] * (w[k] + shape.offset);
        along += weighted * ((a[k] - center) * scale);
        level += weighted;
      }
    }
    along = block_reduce(along, scratch, Sum{}) / shape.width;
    level = rms ? 0.f : block_reduce(level, scratch, Sum{}) / shape.width;
    for (int64_t i = threadIdx.x * V; i < shape.width; i += blockDim.x * V) {
      float g[V], a[V], w[V], d[V];
      load<V>(dy + first + i, g);
      load<V>(h + first + i, a);
      load<V>(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float normed = (a[k] - center) * scale;
        d[k] = scale * (g[k] * (w[k] + shape.offset) - normed * along - level);
        dweight[i + k] += g[k] * normed;
        dbias[i + k] += g[k];
      }
      if (dsum) {
        load<V>(dsum + first + i, a);
#pragma unroll
        for (int k = 0; k < V; ++k) d[k] += a[k];
      }
      store<V>(d, dx + first + i);
    }
  }
}

}  // namespace nvmm
