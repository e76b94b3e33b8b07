#include "activation.cuh"
#include "columns.cuh"
#include "launch.h"

namespace nvmm {
namespace {

Tensor activation(const Tensor& x_, const std::optional<Tensor>& bias_, int64_t kind_) {
  const Kind kind = static_cast<Kind>(kind_);
  const Tensor y = torch::stable::new_empty(x_, check_activation(x_, bias_, kind));
  const Tensor x = dense(x_);
  const auto bias = dense(bias_);
  const int64_t width = y.size(-1);
  if (y.numel() == 0) return y;
  dispatch<true>(x, [&](auto zero) {
    dispatch_kind(kind, [&](auto constant) {
      using T = decltype(zero);
      constexpr Kind k = decltype(constant)::value;
      const bool fits = packs<T>(width, {pointer<T>(x), pointer<T>(bias)});
      auto kernel = fits ? activation_forward<T, wide<T>, k> : activation_forward<T, 1, k>;
      NVMM_LAUNCH(kernel, static_cast<unsigned>(rows_of(y)),
                  block_size(fits ? width / wide<T> : width, 512), 0, x, pointer<T>(x),
                  pointer<T>(bias), target<T>(y), width);
    });
  });
  return y;
}

ActivationGradients backward(const Tensor& dy_, const Tensor& x_,
                             const std::optional<Tensor>& bias_, int64_t kind_) {
  const Kind kind = static_cast<Kind>(kind_);
  check_activation_gradient(dy_, x_, bias_, kind);
  const Tensor dy = dense(dy_), x = dense(x_), dx = torch::stable::empty_like(x);
  const auto bias = dense(bias_);
  const int64_t width = dy.size(-1), rows = rows_of(dy);
  STD_TORCH_CHECK(x.size(-1) < int64_t{1} << 31, "activation: rows of less than 2^31 columns");
  Tensor dbias = torch::stable::new_empty(x, {bias ? x.size(-1) : 0});
  if (rows == 0) return {dx, torch::stable::zero_(dbias)};
  // Sums want few blocks, rows alone as many as there are.
  const int64_t blocks = bias ? grid_size(rows) : rows;
  const Tensor partial = floats(x, {bias ? blocks : 0, 1, x.size(-1)});
  dispatch<true>(x, [&](auto zero) {
    using T = decltype(zero);
    dispatch_kind(kind, [&](auto constant) {
      constexpr Kind k = decltype(constant)::value;
      const bool fits = packs<T>(width, {pointer<T>(x), pointer<T>(dy), pointer<T>(bias)});
      auto kernel = fits ? activation_backward<T, wide<T>, k> : activation_backward<T, 1, k>;
      NVMM_LAUNCH(kernel, static_cast<unsigned>(blocks),
                  block_size(fits ? width / wide<T> : width, 512), 0, x, pointer<T>(dy),
                  pointer<T>(x), pointer<T>(bias), target<T>(dx),
                  bias ? target<float>(partial) : nullptr, rows, width);
    });
    if (bias) reduce_columns<T>(partial, 0, dbias);
  });
  return {dx, dbias};
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("activation_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
