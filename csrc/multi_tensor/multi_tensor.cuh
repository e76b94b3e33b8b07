// L2 norm and scaling of a list of tensors. One block for a chunk of a tensor.
#pragma once

#include "device.h"
#include "lists.cuh"

namespace nvmm {

// Sums of `values` of all threads, given to the first; the block has a power of two of them.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  scratch[threadIdx.x] = value;
  for (unsigned half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  return scratch[0];
}

// sums[chunk] = sum of squares, in float64: none overflows or vanishes.
template <class T, int V>
__global__ void squares_reduce(const __grid_constant__ Batch<1> batch, double* __restrict__ sums) {
  NVMM_DYNAMIC_SHARED(double, scratch);
  const Place place = place_of(batch);
  const T* x = address_of<T>(batch, 0, place);
  const int64_t count = place.end - place.begin, whole = on_16_bytes(x) ? count / V * V : 0;
  double sum = 0.;
  for (int64_t i = threadIdx.x * V; i < whole; i += blockDim.x * V) {
    float a[V];
    load<V>(x + i, a);
#pragma unroll
    for (int k = 0; k < V; ++k) sum += static_cast<double>(a[k]) * a[k];
  }
  for (int64_t i = whole + threadIdx.x; i < count; i += blockDim.x) {
    const double a = static_cast<float>(x[i]);
    sum += a * a;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block: the root of the sum of all chunks' sums; a flag where it is not finite.
__global__ void norm_reduce(const double* __restrict__ sums, int64_t count,
                            float* __restrict__ norm, int* __restrict__ flag) {
  NVMM_DYNAMIC_SHARED(double, scratch);
  double sum = 0.;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    const float root = static_cast<float>(sqrt(sum));
    *norm = root;
    if (!(root <= 3.402823466e38f)) *flag = 1;
  }
}

// y = x * factor; x and y may be the same. A flag where a number of x is not finite.
template <class A, class B, int V>
__global__ void scale_list(const __grid_constant__ Batch<2> batch, float factor, int* flag) {
  const Place place = place_of(batch);
  const A* x = address_of<A>(batch, 0, place);
  B* y = address_of<B>(batch, 1, place);
  const int64_t count = place.end - place.begin;
  const int64_t whole = on_16_bytes(x) && on_16_bytes(y) ? count / V * V : 0;
  float finite = 0.f;  // NaN once a number is not
  for (int64_t i = threadIdx.x * V; i < whole; i += blockDim.x * V) {
    float a[V];
    load<V>(x + i, a);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      finite += a[k] * 0.f;
      a[k] *= factor;
    }
    store<V>(a, y + i);
  }
  for (int64_t i = whole + threadIdx.x; i < count; i += blockDim.x) {
    const float a = static_cast<float>(x[i]);
    finite += a * 0.f;
    y[i] = static_cast<B>(a * factor);
  }
  if (finite != 0.f) *flag = 1;
}

}  // namespace nvmm
