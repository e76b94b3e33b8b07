// What both implementations of the joint RMSNorm check. A rank has some columns of each row.
#pragma once

#include "tensors.h"

namespace nvmm {

// Columns of this rank; those from `real` on are padding, and weight[first] belongs to the first.
struct Share {
  int64_t rows, width, first, real;
};

inline Share check_joint(const Tensor& x, const Tensor& weight, int64_t first, int64_t real) {
  STD_TORCH_CHECK(x.dim() > 0 && 0 <= real && real <= x.size(-1),
                  "joint_norm: real columns must be some of x's last axis");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.scalar_type() == x.scalar_type() && 0 <= first &&
                      first + real <= weight.numel(),
                  "joint_norm: the weight must be a vector of x's dtype that holds x's columns");
  return {rows_of(x), x.size(-1), first, real};
}

// Row statistics: contiguous float32 [rows].
inline void check_rows(const Tensor& statistic, const Share& share) {
  STD_TORCH_CHECK(statistic.numel() == share.rows && statistic.is_contiguous() &&
                      statistic.scalar_type() == ScalarType::Float,
                  "joint_norm: row statistics must be contiguous float32 [rows]");
}

inline void check_gradient(const Tensor& dy, const Tensor& x) {
  STD_TORCH_CHECK(dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(),
                  "joint_norm: the gradient must have x's shape and dtype");
}

}  // namespace nvmm
