// Host side of a CUDA launch, under nvcc and in the simulator.
#pragma once

#include "device.h"
#include "tensors.h"

#ifndef NVMM_SIMULATED
// Weak: the library loads where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device, void** stream);
#endif

namespace nvmm {

inline cudaStream_t stream_of(const Tensor& tensor) {
#ifdef NVMM_SIMULATED
  return nullptr;
#else
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

inline void check_launch() {
#ifndef NVMM_SIMULATED
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// Packs only where every row starts on 16 bytes; counts: lengths of rows, and their strides.
template <class T>
bool packs(std::initializer_list<int64_t> counts, std::initializer_list<const void*> pointers) {
  const auto whole = [](int64_t count) { return count % wide<T> == 0; };
  return std::all_of(counts.begin(), counts.end(), whole) &&
         std::all_of(pointers.begin(), pointers.end(), aligned);
}

template <class T>
bool packs(int64_t width, std::initializer_list<const void*> pointers) {
  return packs<T>({width}, pointers);
}

// Threads of a block that works on `items` packs: whole warps, at most `most`.
inline unsigned block_size(int64_t items, unsigned most) {
#ifdef NVMM_SIMULATED
  if (simulator::settings.threads) most = simulator::settings.threads;
#endif
  const int64_t needed = (items + warp - 1) / warp * warp;
  return static_cast<unsigned>(std::clamp<int64_t>(needed, warp, most));
}

// Blocks for a loop over the whole grid: two for each of an H100's 132 multiprocessors.
inline unsigned grid_size(int64_t items) {
#ifdef NVMM_SIMULATED
  items = std::min<int64_t>(items, 2);  // so that a few rows make blocks loop
#endif
  return static_cast<unsigned>(std::clamp<int64_t>(items, 1, 264));
}

}  // namespace nvmm
