// Sums over rows: each block of a kernel leaves its own, these add them up without atomics.
#pragma once

#include "launch.h"

namespace nvmm {

// out[c] = sum over r of partial[r][c], c < columns.
template <class T>
__global__ void sum_rows(const float* __restrict__ partial, T* __restrict__ out, int64_t rows,
                         int64_t stride, int64_t columns) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  float total = 0.f;
  for (int64_t r = 0; r < rows; ++r) total += partial[r * stride + c];
  out[c] = static_cast<T>(total);
}

// out = partial[:, which].sum(0), partial [blocks, parts, columns] in fp32.
template <class T>
void reduce_columns(const Tensor& partial, int which, const Tensor& out) {
  const int64_t columns = partial.size(2);
  auto kernel = sum_rows<T>;
  NVMM_LAUNCH(kernel, static_cast<unsigned>((columns + 127) / 128), 128, 0, partial,
              pointer<float>(partial) + which * columns, target<T>(out), partial.size(0),
              partial.size(1) * columns, columns);
}

}  // namespace nvmm
