// A launch over a list of tensors: their addresses travel as the kernel's argument, and every block
// finds its tensor and chunk by itself. The idea of a launch for many tensors is Apex's
// multi_tensor_apply.
#pragma once

#include "launch.h"
#include "lists.h"

namespace nvmm {

constexpr int64_t chunk_elements = 16384;  // of a block
constexpr int batch_tensors = 64;          // of a launch

// Tensors of several lists, side by side; CUDA takes arguments of up to 4 KB.
template <int lists>
struct Batch {
  void* address[lists][batch_tensors];
  int64_t size[batch_tensors];
  unsigned first[batch_tensors + 1];  // block of the tensor's first chunk; blocks of all
  int tensors;
};
static_assert(sizeof(Batch<5>) <= 4096);

// A block's tensor and its part of it.
struct Place {
  int tensor;
  int64_t begin, end;
};

template <int lists>
__device__ __forceinline__ Place place_of(const Batch<lists>& batch) {
  int low = 0, high = batch.tensors;  // the tensor is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first[middle] <= blockIdx.x ? low : high) = middle;
  }
  const int64_t begin = int64_t{blockIdx.x - batch.first[low]} * chunk_elements;
  const int64_t end = begin + chunk_elements;
  return {low, begin, end < batch.size[low] ? end : batch.size[low]};
}

template <class T, int lists>
__device__ __forceinline__ T* address_of(const Batch<lists>& batch, int list, const Place& place) {
  return static_cast<T*>(batch.address[list][place.tensor]) + place.begin;
}

__device__ __forceinline__ bool on_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Calls f(batch, blocks before it) for batches that hold all tensors of the lists but empty ones.
// An empty list stands for null pointers.
template <int lists, class F>
void for_batches(const List* const (&all)[lists], const F& f) {
  Batch<lists> batch{};
  int64_t before = 0;
  const auto flush = [&] {
    if (batch.tensors) f(batch, before);
    before += batch.first[batch.tensors];
    batch.tensors = 0;
  };
  for (size_t t = 0; t < all[0]->size(); ++t) {
    const int64_t count = (*all[0])[t].numel();
    if (!count) continue;
    const int n = batch.tensors++;
    for (int l = 0; l < lists; ++l) {
      batch.address[l][n] = all[l]->empty() ? nullptr : target<void>((*all[l])[t]);
    }
    batch.size[n] = count;
    const int64_t blocks = (count + chunk_elements - 1) / chunk_elements;
    batch.first[n + 1] = batch.first[n] + static_cast<unsigned>(blocks);
    if (batch.tensors == batch_tensors) flush();
  }
  flush();
}

}  // namespace nvmm
