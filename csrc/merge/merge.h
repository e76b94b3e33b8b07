// What the CPU and the CUDA implementation of merge share: checks and outputs.
#pragma once

#include "tensors.h"

namespace nvmm {

inline Tensor merge_output(const Tensor& base, const Tensor& values, const Tensor& source) {
  STD_TORCH_CHECK(base.dim() == 2 && values.dim() == 2 && base.size(1) == values.size(1) &&
                      alike(values, base),
                  "merge: base and values must be rows of one width and dtype");
  STD_TORCH_CHECK(source.dim() == 1 && source.scalar_type() == ScalarType::Long &&
                      source.device() == base.device(),
                  "merge: the source must be int64 [rows]");
  return torch::stable::new_empty(base, {source.size(0), base.size(1)});
}

// Gradients of base and values.
inline std::tuple<Tensor, Tensor> merge_gradients(const Tensor& dy, const Tensor& target,
                                                  int64_t base_rows) {
  const int64_t rows = target.numel();
  STD_TORCH_CHECK(dy.dim() == 2 && target.dim() == 1 && target.scalar_type() == ScalarType::Long &&
                      target.device() == dy.device() && 0 <= base_rows && base_rows <= rows,
                  "merge: the target must be int64, one for each row of base and values");
  const int64_t width = dy.size(1);
  return {torch::stable::new_empty(dy, {base_rows, width}),
          torch::stable::new_empty(dy, {rows - base_rows, width})};
}

}  // namespace nvmm
