// Activations with bias, forward and backward (which recomputes them). One block for a row.
#pragma once

#include "activation.h"
#include "device.h"

namespace nvmm {

template <int V, class T>
__device__ __forceinline__ void load_biased(const T* x, const T* bias, float (&to)[V]) {
  load<V>(x, to);
  if (bias) {
    float b[V];
    load<V>(bias, b);
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] += b[k];
  }
}

// y[width] = f(x + bias), or f(first half) * second half of [2 width].
template <class T, int V, Kind kind>
__global__ void activation_forward(const T* __restrict__ x, const T* __restrict__ bias,
                                   T* __restrict__ y, int64_t width) {
  x += int64_t{blockIdx.x} * width * (gated(kind) ? 2 : 1);
  y += int64_t{blockIdx.x} * width;
  for (int64_t i = threadIdx.x * V; i < width; i += blockDim.x * V) {
    float a[V], up[V];
    load_biased<V>(x + i, bias ? bias + i : nullptr, a);
    if (gated(kind)) load_biased<V>(x + width + i, bias ? bias + width + i : nullptr, up);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] = value<kind, Device>(a[k]) * (gated(kind) ? up[k] : 1.f);
    store<V>(a, y + i);
  }
}

// sums[k] of this block's rows in memory, not in registers: the first row begins them.
template <int V>
__device__ __forceinline__ void add_row(const float (&d)[V], bool begins, float* sums) {
#pragma unroll
  for (int k = 0; k < V; ++k) sums[k] = (begins ? 0.f : sums[k]) + d[k];
}

// dx of every row, and this block's sums of dx over its rows in partial[blockIdx.x], where there is
// a bias. A block takes every gridDim.x-th row; a thread always has the same columns, counted in 64
// bits: with 32 nvcc splits the stores of packs. Two blocks a multiprocessor: without that bound GEGLU
// takes more registers.
template <class T, int V, Kind kind>
__global__ void __launch_bounds__(512, 2) activation_backward(const T* __restrict__ dy, const T* __restrict__ x,
                                    const T* __restrict__ bias, T* __restrict__ dx,
                                    float* __restrict__ partial, int64_t rows, int64_t width) {
  constexpr int halves = gated(kind) ? 2 : 1;
  if (partial) partial += int64_t{blockIdx.x} * width * halves;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const bool begins = row == blockIdx.x;
    const T *dy_row = dy + row * width, *x_row = x + row * width * halves;
    T* dx_row = dx + row * width * halves;
    for (int64_t i = threadIdx.x * V; i < width; i += blockDim.x * V) {
      float g[V], a[V], d[V];
      load<V>(dy_row + i, g);
      load_biased<V>(x_row + i, bias ? bias + i : nullptr, a);
      if (gated(kind)) {
        const int64_t second = width + i;
#pragma unroll
        for (int k = 0; k < V; ++k) d[k] = g[k] * value<kind, Device>(a[k]);
        store<V>(d, dx_row + second);
        if (partial) add_row<V>(d, begins, partial + second);
        load_biased<V>(x_row + second, bias ? bias + second : nullptr, d);
#pragma unroll
        for (int k = 0; k < V; ++k) g[k] *= d[k];
      }
#pragma unroll
      for (int k = 0; k < V; ++k) d[k] = g[k] * slope<kind, Device>(a[k]);
      store<V>(d, dx_row + i);
      if (partial) add_row<V>(d, begins, partial + i);
    }
  }
}

}  // namespace nvmm
