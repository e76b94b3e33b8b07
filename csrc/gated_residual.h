// What both implementations of gated_residual check.
#pragma once

#include "tensors.h"

namespace nvmm {

inline void check_gated(const Tensor& residual, const Tensor& branch,
                        const std::optional<Tensor>& bias, const Tensor& gate,
                        const std::optional<Tensor>& mask) {
  const auto same = [&](const Tensor& other) { return other.scalar_type() == branch.scalar_type(); };
  STD_TORCH_CHECK(branch.dim() > 0 && residual.numel() == branch.numel() && same(residual),
                  "gated_residual: residual and branch must agree in shape and dtype");
  STD_TORCH_CHECK(!bias || (bias->numel() == branch.size(-1) && same(*bias)),
                  "gated_residual: the bias must have the length of the last axis");
  STD_TORCH_CHECK((gate.numel() == 1 || gate.numel() == branch.size(-1)) && same(gate),
                  "gated_residual: the gate must be one number or one for each channel");
  STD_TORCH_CHECK(!mask || (mask->numel() == rows_of(branch) && same(*mask)),
                  "gated_residual: the mask must have one number for each row");
}

}  // namespace nvmm
