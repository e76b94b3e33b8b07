#include "linear_cross_entropy.cuh"
#include "launch.h"

namespace nvmm {
namespace {

void reduce(const Tensor& logits, const Tensor& labels, int64_t first, int64_t valid,
            Tensor maximum, Tensor total, Tensor picked) {
  const Columns columns =
      check_logits(logits, labels, first, valid, {&maximum, &total, &picked});
  if (logits.numel() == 0) return;
  dispatch<true>(logits, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>(columns.stride, {pointer<T>(logits)});
    auto kernel = fits ? logits_reduce<T, wide<T>> : logits_reduce<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(logits.size(0)),
                block_size(fits ? valid / wide<T> : valid, 512), scratch_bytes, logits,
                pointer<T>(logits), pointer<int64_t>(labels), target<float>(maximum),
                target<float>(total), target<float>(picked), columns);
  });
}

void gradient(Tensor logits, const Tensor& labels, const Tensor& logsumexp, const Tensor& scale,
              int64_t first, int64_t valid) {
  const Columns columns = check_logits(logits, labels, first, valid, {&logsumexp, &scale});
  if (logits.numel() == 0) return;
  dispatch<true>(logits, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>(columns.stride, {pointer<T>(logits)});
    auto kernel = fits ? logits_gradient<T, wide<T>> : logits_gradient<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(logits.size(0)),
                block_size(fits ? columns.stride / wide<T> : columns.stride, 512), 0, logits,
                target<T>(logits), pointer<int64_t>(labels), pointer<float>(logsumexp),
                pointer<float>(scale), columns);
  });
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("logits_reduce", TORCH_BOX(&reduce));
  m.impl("logits_gradient", TORCH_BOX(&gradient));
}

}  // namespace nvmm
