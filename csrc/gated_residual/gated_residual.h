// What both implementations of gated_residual check.
#pragma once

#include "tensors.h"

namespace nvmm {

inline void check_gated(const Tensor& residual, const Tensor& branch,
                        const std::optional<Tensor>& bias, const Tensor& gate,
                        const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(branch.dim() > 0 && same_shape(residual, branch),
                  "gated_residual: residual and branch must agree in shape and dtype");
  const int64_t width = branch.size(-1);
  STD_TORCH_CHECK(!bias || is_vector(*bias, width, branch),
                  "gated_residual: the bias must have the length of the last axis");
  STD_TORCH_CHECK(is_vector(gate, width, branch) || (gate.numel() == 1 && alike(gate, branch)),
                  "gated_residual: the gate must be one number or one for each channel");
  STD_TORCH_CHECK(!mask || (mask->sizes() == branch.sizes().slice(0, branch.dim() - 1) &&
                            alike(*mask, branch)),
                  "gated_residual: the mask must have one number for each row");
}

}  // namespace nvmm
