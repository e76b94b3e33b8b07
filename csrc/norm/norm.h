// What the CPU and the CUDA implementation of norm share: checks and outputs.
#pragma once

#include "tensors.h"

namespace nvmm {

using NormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;    // y, sum, mean, rstd
using NormGradients = std::tuple<Tensor, Tensor, Tensor>;          // dx, dweight, dbias

inline void check_norm(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && is_vector(weight, x.size(-1), x),
                  "norm: the weight must have the length of x's last axis, and x's dtype");
}

inline void check_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                       const std::optional<Tensor>& bias, bool rms) {
  check_norm(x, weight);
  STD_TORCH_CHECK(!residual || same_shape(*residual, x),
                  "norm: the residual must have x's shape and dtype");
  STD_TORCH_CHECK(!bias || !rms, "norm: RMSNorm has no bias");
  STD_TORCH_CHECK(!bias || is_vector(*bias, x.size(-1), x),
                  "norm: the bias must have the length of x's last axis, and x's dtype");
}

inline void check_norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum,
                                const Tensor& h, const Tensor& weight, const Tensor& mean,
                                const Tensor& rstd, bool rms) {
  check_norm(h, weight);
  STD_TORCH_CHECK(same_shape(dy, h) && (!dsum || same_shape(*dsum, h)),
                  "norm: gradients must have the shape and dtype of what was normed");
  STD_TORCH_CHECK(is_statistic(mean, rms ? 0 : rows_of(h), h) && is_statistic(rstd, rows_of(h), h),
                  "norm: row statistics must be contiguous float32 [rows]");
}

inline NormOutputs norm_outputs(const Tensor& x, bool residual, bool rms) {
  Tensor sum = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const int64_t rows = rows_of(x);
  return {torch::stable::empty_like(x), sum, floats(x, {rms ? 0 : rows}), floats(x, {rows})};
}

}  // namespace nvmm
