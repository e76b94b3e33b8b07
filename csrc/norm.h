// What the CPU and the CUDA implementation of norm share: checks and outputs.
#pragma once

#include "tensors.h"

namespace nvmm {

using NormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;    // y, sum, mean, rstd
using NormGradients = std::tuple<Tensor, Tensor, Tensor>;          // dx, dweight, dbias

inline void check_norm(const Tensor& x, const std::optional<Tensor>& other, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.numel() == x.size(-1),
                  "norm: the weight must have the length of x's last axis");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "norm: x and weight differ in dtype");
  STD_TORCH_CHECK(!other || (other->numel() == x.numel() && other->scalar_type() == x.scalar_type()),
                  "norm: the residual must have x's shape and dtype");
}

inline NormOutputs norm_outputs(const Tensor& x, bool residual, bool rms) {
  Tensor sum = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const int64_t rows = rows_of(x);
  return {torch::stable::empty_like(x), sum, floats(x, {rms ? 0 : rows}), floats(x, {rows})};
}

}  // namespace nvmm
