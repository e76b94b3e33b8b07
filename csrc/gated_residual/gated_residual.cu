#include "gated_residual.cuh"
#include "columns.cuh"
#include "gated_residual.h"
#include "launch.h"

namespace nvmm {
namespace {

GatedShape shape_of(const Tensor& branch, const Tensor& gate, bool tanh) {
  const bool scalar = gate.numel() == 1;
  return {rows_of(branch), branch.size(-1), scalar, tanh};
}

Tensor forward(const Tensor& residual_, const Tensor& branch_, const std::optional<Tensor>& bias_,
               const Tensor& gate_, const std::optional<Tensor>& mask_, bool tanh) {
  check_gated(residual_, branch_, bias_, gate_, mask_);
  const Tensor residual = dense(residual_), branch = dense(branch_), gate = dense(gate_);
  const auto bias = dense(bias_), mask = dense(mask_);
  const Tensor y = torch::stable::empty_like(residual);
  const GatedShape shape = shape_of(branch, gate, tanh);
  if (shape.rows == 0) return y;
  dispatch<true>(branch, [&](auto zero) {
    using T = decltype(zero);
    const bool fits =
        packs<T>(shape.width, {pointer<T>(residual), pointer<T>(branch), pointer<T>(bias)});
    auto kernel = fits ? gated_forward<T, wide<T>> : gated_forward<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(shape.rows),
                block_size(fits ? shape.width / wide<T> : shape.width, 512), 0, branch,
                pointer<T>(residual), pointer<T>(branch), pointer<T>(bias), pointer<T>(gate),
                pointer<T>(mask), target<T>(y), shape);
  });
  return y;
}

// {dbranch, the sums over rows of mask * dy * (branch + bias) and of mask * dy: float32 [2, width]}.
std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& branch_,
                                    const std::optional<Tensor>& bias_, const Tensor& gate_,
                                    const std::optional<Tensor>& mask_, bool tanh) {
  check_gated(dy_, branch_, bias_, gate_, mask_);
  const Tensor dy = dense(dy_), branch = dense(branch_), gate = dense(gate_);
  const auto bias = dense(bias_), mask = dense(mask_);
  const GatedShape shape = shape_of(branch, gate, tanh);
  const Tensor dbranch = torch::stable::empty_like(branch);
  Tensor sums = floats(branch, {2, shape.width});
  if (shape.rows == 0) return {dbranch, torch::stable::zero_(sums)};
  const Tensor partial = floats(branch, {grid_size(shape.rows), 1, 2 * shape.width});
  dispatch<true>(branch, [&](auto zero) {
    using T = decltype(zero);
    const bool fits =
        packs<T>(shape.width, {pointer<T>(dy), pointer<T>(branch), pointer<T>(bias)});
    auto kernel = fits ? gated_backward<T, wide<T>> : gated_backward<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(partial.size(0)),
                block_size(fits ? shape.width / wide<T> : shape.width, 512), 0, branch,
                pointer<T>(dy), pointer<T>(branch), pointer<T>(bias), pointer<T>(gate),
                pointer<T>(mask), target<T>(dbranch), target<float>(partial), shape);
  });
  reduce_columns<float>(partial, 0, sums);
  return {dbranch, sums};
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("gated_residual", TORCH_BOX(&forward));
  m.impl("gated_residual_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
