// AdamW over a list of tensors. One block for a chunk of a tensor.
#pragma once

#include "adamw.h"
#include "device.h"
#include "lists.cuh"

namespace nvmm {

template <class P, class S>
struct AdamPointers {
  P* parameter;
  const P* gradient;
  float* master;
  S *mean, *square;
};

template <int V, bool mastered, class P, class S>
__device__ __forceinline__ void adamw_pack(const AdamPointers<P, S>& at, int64_t i,
                                           const AdamStep& step) {
  float p[V], g[V], m[V], v[V];
  if constexpr (mastered) {
    load<V>(at.master + i, p);
  } else {
    load<V>(at.parameter + i, p);
  }
  load<V>(at.gradient + i, g);
  load<V>(at.mean + i, m);
  load<V>(at.square + i, v);
#pragma unroll
  for (int k = 0; k < V; ++k) p[k] = adam(p[k], g[k], m[k], v[k], step);
  if constexpr (mastered) store<V>(p, at.master + i);
  store<V>(p, at.parameter + i);
  store<V>(m, at.mean + i);
  store<V>(v, at.square + i);
}

// V: elements at a time where all addresses lie on 16 bytes; what is left goes one by one.
template <class P, class S, bool mastered, int V>
__global__ void adamw_update(const __grid_constant__ Batch<5> batch, AdamStep step) {
  const Place place = place_of(batch);
  const AdamPointers<P, S> at{
      address_of<P>(batch, 0, place), address_of<P>(batch, 1, place),
      mastered ? address_of<float>(batch, 2, place) : nullptr, address_of<S>(batch, 3, place),
      address_of<S>(batch, 4, place)};
  const bool fits = on_16_bytes(at.parameter) && on_16_bytes(at.gradient) &&
                    on_16_bytes(at.master) && on_16_bytes(at.mean) && on_16_bytes(at.square);
  const int64_t count = place.end - place.begin, whole = fits ? count / V * V : 0;
  for (int64_t i = threadIdx.x * V; i < whole; i += blockDim.x * V) {
    adamw_pack<V, mastered>(at, i, step);
  }
  for (int64_t i = whole + threadIdx.x; i < count; i += blockDim.x) {
    adamw_pack<1, mastered>(at, i, step);
  }
}

}  // namespace nvmm
