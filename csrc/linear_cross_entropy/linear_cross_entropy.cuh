// The softmax's part of linear cross-entropy over one chunk of the vocabulary. One block for a row.
#pragma once

#include "device.h"
#include "linear_cross_entropy.h"

namespace nvmm {

// Takes a chunk of logits into the running maximum and sum of exp(logit - maximum) of each row,
// and picks the label's logit where the chunk has it. Columns past the last whole pack go one by one.
template <class T, int V>
__global__ void logits_reduce(const T* __restrict__ logits, const int64_t* __restrict__ labels,
                              float* maximum, float* total, float* picked, Columns columns) {
  NVMM_DYNAMIC_SHARED(float, scratch);
  const int64_t row = blockIdx.x;
  logits += row * columns.stride;
  float most = -INFINITY, sum = 0.f;
  const int64_t whole = columns.valid / V * V;
  for (int64_t i = threadIdx.x * V; i < whole; i += blockDim.x * V) {
    float a[V];
    load<V>(logits + i, a);
    float top = most;
#pragma unroll
    for (int k = 0; k < V; ++k) top = fmaxf(top, a[k]);
    const float base = top == -INFINITY ? 0.f : top;
    sum *= expf(most - base);
#pragma unroll
    for (int k = 0; k < V; ++k) sum += expf(a[k] - base);
    most = top;
  }
  for (int64_t i = whole + threadIdx.x; i < columns.valid; i += blockDim.x) {
    const float a = static_cast<float>(logits[i]);
    const float top = fmaxf(most, a), base = top == -INFINITY ? 0.f : top;
    sum = sum * expf(most - base) + expf(a - base);
    most = top;
  }
  const float before = maximum[row];
  const float top = fmaxf(before, block_reduce(most, scratch, Maximum{}));
  const float base = top == -INFINITY ? 0.f : top;
  sum = block_reduce(sum * expf(most - base), scratch, Sum{});
  if (threadIdx.x == 0) {
    total[row] = total[row] * expf(before - base) + sum;
    maximum[row] = top;
    const int64_t label = labels[row] - columns.first;
    if (0 <= label && label < columns.valid) picked[row] = static_cast<float>(logits[label]);
  }
}

// logits <- (softmax - one_hot(label)) * scale, in place; 0 in padding columns.
template <class T, int V>
__global__ void logits_gradient(T* logits, const int64_t* __restrict__ labels,
                                const float* __restrict__ logsumexp, const float* __restrict__ scale,
                                Columns columns) {
  const int64_t row = blockIdx.x;
  logits += row * columns.stride;
  const float level = logsumexp[row], factor = scale[row];
  const int64_t label = labels[row] - columns.first;
  for (int64_t i = threadIdx.x * V; i < columns.stride; i += blockDim.x * V) {
    float a[V];
    load<V>(logits + i, a);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float p = i + k < columns.valid ? expf(a[k] - level) : 0.f;
      a[k] = factor == 0.f ? 0.f : (p - (i + k == label ? 1.f : 0.f)) * factor;
    }
    store<V>(a, logits + i);
  }
}

}  // namespace nvmm
