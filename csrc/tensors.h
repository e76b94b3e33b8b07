// Tensors of the stable ABI: checks, pointers, dtypes, launches.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

// The simulator's operations live beside the real ones, under another name.
#ifdef NVMM_SIMULATED
#define NVMM_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(nvmm_simulated, CPU, m)
#define NVMM_LIBRARY(m) STABLE_TORCH_LIBRARY(nvmm_simulated, m)
#else
#define NVMM_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(nvmm, CUDA, m)
#define NVMM_LIBRARY(m) STABLE_TORCH_LIBRARY(nvmm, m)
#endif

namespace nvmm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

template <class T>
T* target(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Whether it has the dtype of `like`, and is where that is.
inline bool alike(const Tensor& tensor, const Tensor& like) {
  return tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device();
}

inline bool same_shape(const Tensor& tensor, const Tensor& like) {
  return tensor.sizes() == like.sizes() && alike(tensor, like);
}

inline bool is_vector(const Tensor& tensor, int64_t length, const Tensor& like) {
  return tensor.dim() == 1 && tensor.numel() == length && alike(tensor, like);
}

// Contiguous float32 [length], where `like` is.
inline bool is_statistic(const Tensor& tensor, int64_t length, const Tensor& like) {
  return tensor.numel() == length && tensor.is_contiguous() &&
         tensor.scalar_type() == ScalarType::Float && tensor.device() == like.device();
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// The tensor, copied only where its last axis is not contiguous.
inline Tensor dense_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

inline int64_t rows_of(const Tensor& tensor) {
  return tensor.size(-1) ? tensor.numel() / tensor.size(-1) : 0;
}

// Calls f(T{}) for the tensor's dtype; Half is for GPUs only.
template <bool half, class F>
void dispatch(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    case ScalarType::Half:
      if constexpr (half) return f(c10::Half{});
    default:
      STD_TORCH_CHECK(false, "nvmm kernels take float32 and bfloat16, on CUDA float16 too");
  }
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace nvmm
