#include "merge.cuh"
#include "launch.h"
#include "merge.h"

namespace nvmm {
namespace {

Tensor forward(const Tensor& base_, const Tensor& values_, const Tensor& source_) {
  const Tensor base = dense(base_), values = dense(values_), source = dense(source_);
  const Tensor out = merge_output(base, values, source);
  if (out.numel() == 0) return out;
  const int64_t width = out.size(1);
  dispatch<true>(base, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>(width, {pointer<T>(base), pointer<T>(values)});
    auto kernel = fits ? merge_forward<T, wide<T>> : merge_forward<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(out.size(0)),
                block_size(fits ? width / wide<T> : width, 512), 0, base, pointer<T>(base),
                pointer<T>(values), pointer<int64_t>(source), target<T>(out), base.size(0), width);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& target_, int64_t base_rows) {
  const Tensor dy = dense(dy_), where = dense(target_);
  const auto gradients = merge_gradients(dy, where, base_rows);
  const auto& [dbase, dvalues] = gradients;
  const int64_t width = dy.size(1);
  if (where.numel() * width == 0) return gradients;
  dispatch<true>(dy, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>(width, {pointer<T>(dy)});
    auto kernel = fits ? merge_backward<T, wide<T>> : merge_backward<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(where.numel()),
                block_size(fits ? width / wide<T> : width, 512), 0, dy, pointer<T>(dy),
                pointer<int64_t>(where), target<T>(dbase), target<T>(dvalues), base_rows, width);
  });
  return gradients;
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("merge", TORCH_BOX(&forward));
  m.impl("merge_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
