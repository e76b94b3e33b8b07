// What both implementations of the joint RMSNorm share: checks, dense copies and outputs. A rank has
// some columns of each row.
#pragma once

#include "tensors.h"

namespace nvmm {

// Columns of this rank; those from `real` on are padding, and weight[first] belongs to the first.
struct Share {
  int64_t rows, width, first, real;
};

// An operation's inputs, checked and dense.
struct Joint {
  Share share;
  Tensor x, weight;
};

struct JointGradient {
  Share share;
  Tensor dy, x, weight;
};

// [rows] sums of dy * weight * normed x, and those of dy * normed x over rows: [whole weight].
using JointSums = std::tuple<Tensor, Tensor>;

inline Share share_of(const Tensor& x, int64_t first, int64_t real) {
  STD_TORCH_CHECK(x.dim() > 0 && 0 <= real && real <= x.size(-1),
                  "joint_norm: real columns must be some of x's last axis");
  return {rows_of(x), x.size(-1), first, real};
}

inline void check_rows(const Tensor& statistic, const Share& share, const Tensor& x) {
  STD_TORCH_CHECK(is_statistic(statistic, share.rows, x),
                  "joint_norm: row statistics must be contiguous float32 [rows]");
}

inline Joint joint(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t first,
                   int64_t real) {
  const Share share = share_of(x, first, real);
  STD_TORCH_CHECK(is_vector(weight, weight.numel(), x) && 0 <= first &&
                      first + real <= weight.numel(),
                  "joint_norm: the weight must be a vector of x's dtype that holds x's columns");
  check_rows(scale, share, x);
  return {share, dense(x), dense(weight)};
}

inline JointGradient joint(const Tensor& dy, const Tensor& x, const Tensor& weight,
                           const Tensor& scale, int64_t first, int64_t real) {
  STD_TORCH_CHECK(same_shape(dy, x), "joint_norm: the gradient must have x's shape and dtype");
  const Joint forward = joint(x, weight, scale, first, real);
  return {forward.share, dense(dy), forward.x, forward.weight};
}

// The weight's part is zero.
inline JointSums joint_sums(const JointGradient& inputs) {
  Tensor dweight = floats(inputs.x, {inputs.weight.numel()});
  return {floats(inputs.x, {inputs.share.rows}), torch::stable::zero_(dweight)};
}

}  // namespace nvmm
