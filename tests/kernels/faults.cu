// Kernels with a planted fault each, for the simulator's own tests.
#include "device.h"
#include "tensors.h"

namespace nvmm {
namespace {

// y = x reversed, through shared memory.
__global__ void reversed(const float* x, float* y, bool with_barrier) {
  NVMM_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = x[threadIdx.x];
  if (with_barrier) __syncthreads();
  y[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void divergent_barrier(bool leave) {
  const bool some = threadIdx.x >= 17 && threadIdx.x < 32;
  if (!some) {
    __syncthreads();
  } else if (!leave) {
    __shfl_xor_sync(0xffffffffu, 0.f, 1);  // waits for lanes that wait in the barrier
  }
}

__global__ void mask_without_caller(float* y) {
  y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, y[threadIdx.x], 1);
}

__global__ void beyond_shared_memory(float* y) {
  NVMM_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void unwritten_shared_memory(float* y) {
  NVMM_DYNAMIC_SHARED(float, tile);
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void beyond_global_memory(float* y) { y[threadIdx.x + 1] = 1.f; }

Tensor run(const Tensor& x, int64_t fault) {
  const Tensor y = torch::stable::clone(x);
  const unsigned threads = static_cast<unsigned>(x.numel());
  const size_t shared = x.numel() * sizeof(float);
  float* out = target<float>(y);
  switch (fault) {
    case 0:
    case 1:
      NVMM_LAUNCH(reversed, 1, threads, shared, nullptr, pointer<float>(x), out, fault == 0);
      break;
    case 2:
    case 3:
      NVMM_LAUNCH(divergent_barrier, 1, threads, shared, nullptr, fault == 2);
      break;
    case 4:
      NVMM_LAUNCH(mask_without_caller, 1, threads, shared, nullptr, out);
      break;
    case 5:
      NVMM_LAUNCH(beyond_shared_memory, 1, threads, shared, nullptr, out);
      break;
    case 6:
      NVMM_LAUNCH(unwritten_shared_memory, 1, threads, shared, nullptr, out);
      break;
    default:
      NVMM_LAUNCH(beyond_global_memory, 1, threads, shared, nullptr, out);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nvmm_simulated, m) { m.def("faulty(Tensor x, int fault) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(nvmm_simulated, CPU, m) { m.impl("faulty", TORCH_BOX(&run)); }

}  // namespace nvmm
