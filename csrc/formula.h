// What a header needs whose formulas run on both sides: in CUDA kernels and in the CPU's loops.
#pragma once

#ifdef __CUDACC__
#define NVMM_FORMULA __device__ __forceinline__
#define NVMM_BOTH_SIDES __host__ __device__
#else
#define NVMM_BOTH_SIDES
#define NVMM_FORMULA inline __attribute__((always_inline))
#endif

namespace nvmm {

// The standard normal distribution at x: P(X < x), and its density.
struct Normal {
  float below, density;
};

}  // namespace nvmm
