#include "norm.cuh"
#include "columns.cuh"
#include "launch.h"
#include "norm.h"

namespace nvmm {
namespace {

template <class T, int V, bool rms>
void forward(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
             const std::optional<Tensor>& bias, const NormOutputs& out, const NormShape& shape) {
  const auto& [y, sum, mean, rstd] = out;
  auto kernel = norm_forward<T, V, rms>;
  NVMM_LAUNCH(kernel, static_cast<unsigned>(shape.rows), block_size(shape.width / V, 512),
              scratch_bytes, x, pointer<T>(x), pointer<T>(residual), pointer<T>(weight),
              pointer<T>(bias), target<T>(sum), target<T>(y), target<float>(mean),
              target<float>(rstd), shape);
}

NormOutputs norm(const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_,
                 const std::optional<Tensor>& bias_, double eps, bool rms, bool zero_centered) {
  check_norm(x_, residual_, weight_, bias_, rms);
  const Tensor x = dense(x_), weight = dense(weight_);
  const auto residual = dense(residual_), bias = dense(bias_);
  const NormOutputs out = norm_outputs(x, residual.has_value(), rms);
  const NormShape shape{rows_of(x), x.size(-1), static_cast<float>(eps), zero_centered ? 1.f : 0.f};
  if (shape.rows == 0) return out;
  dispatch<true>(x, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>(shape.width, {pointer<T>(x), pointer<T>(residual),
                                             pointer<T>(weight), pointer<T>(bias)});
    auto run = fits ? (rms ? forward<T, wide<T>, true> : forward<T, wide<T>, false>)
                    : (rms ? forward<T, 1, true> : forward<T, 1, false>);
    run(x, residual, weight, bias, out, shape);
  });
  return out;
}

template <class T, int V, bool rms>
void backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& h,
              const Tensor& weight, const Tensor& mean, const Tensor& rstd, const Tensor& dx,
              const Tensor& partial, const NormShape& shape) {
  auto kernel = norm_backward<T, V, rms>;
  NVMM_LAUNCH(kernel, static_cast<unsigned>(partial.size(0)), block_size(shape.width / V, 512),
              scratch_bytes, h, pointer<T>(dy), pointer<T>(dsum), pointer<T>(h), pointer<T>(weight),
              pointer<float>(mean), pointer<float>(rstd), target<T>(dx), target<float>(partial),
              shape);
}

NormGradients norm_backward_(const Tensor& dy_, const std::optional<Tensor>& dsum_,
                             const Tensor& h_, const Tensor& weight_, const Tensor& mean,
                             const Tensor& rstd, bool rms, bool zero_centered) {
  check_norm_backward(dy_, dsum_, h_, weight_, mean, rstd, rms);
  const Tensor dy = dense(dy_), h = dense(h_), weight = dense(weight_);
  const auto dsum = dense(dsum_);
  const NormShape shape{rows_of(h), h.size(-1), 0.f, zero_centered ? 1.f : 0.f};
  const Tensor dx = torch::stable::empty_like(h);
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor dbias = rms ? torch::stable::new_empty(weight, {0}) : torch::stable::empty_like(weight);
  if (shape.rows == 0) return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  const Tensor partial = floats(h, {grid_size(shape.rows), 2, shape.width});
  dispatch<true>(h, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>(
        shape.width, {pointer<T>(dy), pointer<T>(dsum), pointer<T>(h), pointer<T>(weight)});
    auto run = fits ? (rms ? backward<T, wide<T>, true> : backward<T, wide<T>, false>)
                    : (rms ? backward<T, 1, true> : backward<T, 1, false>);
    run(dy, dsum, h, weight, mean, rstd, dx, partial, shape);
    reduce_columns<T>(partial, 0, dweight);
    if (!rms) reduce_columns<T>(partial, 1, dbias);
  });
  return {dx, dweight, dbias};
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward_));
}

}  // namespace nvmm
