// Host side of a CUDA launch, under nvcc and in the simulator.
#pragma once

#include "device.h"
#include "tensors.h"

#ifndef NVMM_SIMULATED
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

// Launches on the device and the current stream of `tensor`, and raises what CUDA says to it.
#define NVMM_LAUNCH(kernel, grid, block, shared, tensor, ...)                         \
  do {                                                                                \
    const torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index()); \
    kernel<<<(grid), (block), (shared), stream_of(tensor)>>>(__VA_ARGS__);            \
    check_launch();                                                                   \
  } while (false)
#endif

namespace nvmm {

#ifndef NVMM_SIMULATED
// Looked up in the libtorch_cuda that torch has loaded, not linked: that is in no library's scope
// but torch's own, and one build loads under a CPU torch too.
inline cudaStream_t stream_of(const Tensor& tensor) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto current_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(library, "nvmm: this torch has loaded no libtorch_cuda.so");
    void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(symbol, "nvmm: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// torch's own check would need symbols of its CUDA libraries.
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}
#endif

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
