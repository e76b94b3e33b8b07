// Rows of two tensors in a given order, and back. One block for a row.
#pragma once

#include "device.h"

namespace nvmm {

// out[r] = row source[r] of base and values, the one behind the other.
template <class T, int V>
__global__ void merge_forward(const T* __restrict__ base, const T* __restrict__ values,
                              const int64_t* __restrict__ source, T* __restrict__ out,
                              int64_t base_rows, int64_t width) {
  const int64_t row = source[blockIdx.x];
  const T* from = row < base_rows ? base + row * width : values + (row - base_rows) * width;
  out += int64_t{blockIdx.x} * width;
  for (int64_t i = threadIdx.x * V; i < width; i += blockDim.x * V) copy<V>(from + i, out + i);
}

// Row r of the gradients of base and values, one behind the other, is dy[target[r]]; zeros where
// that is negative.
template <class T, int V>
__global__ void merge_backward(const T* __restrict__ dy, const int64_t* __restrict__ target,
                               T* __restrict__ dbase, T* __restrict__ dvalues, int64_t base_rows,
                               int64_t width) {
  const int64_t row = blockIdx.x, from = target[row];
  T* to = row < base_rows ? dbase + row * width : dvalues + (row - base_rows) * width;
  const float zeros[V] = {};
  for (int64_t i = threadIdx.x * V; i < width; i += blockDim.x * V) {
    if (from < 0) {
      store<V>(zeros, to + i);
    } else {
      copy<V>(dy + from * width + i, to + i);
    }
  }
}

}  // namespace nvmm
