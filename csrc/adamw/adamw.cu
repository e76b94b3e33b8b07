#include "adamw.cuh"

namespace nvmm {
namespace {

void adamw(List parameters, List gradients, List masters, List means, List squares, double lr,
           double beta1, double beta2, double eps, double weight_decay, int64_t step_,
           bool decoupled) {
  const AdamLists lists{parameters, gradients, masters, means, squares};
  check_adamw(lists);
  if (parameters.empty()) return;
  const AdamStep step = adam_step(lr, beta1, beta2, eps, weight_decay, step_, decoupled);
  dispatch_adamw<true>(lists, [&](auto p, auto s, auto mastered) {
    using P = decltype(p);
    using S = decltype(s);
    constexpr int V = std::max(wide<P>, wide<S>);
    const List* const all[] = {&parameters, &gradients, &masters, &means, &squares};
    for_batches(all, [&](const Batch<5>& batch, int64_t) {
      auto kernel = adamw_update<P, S, decltype(mastered)::value, V>;
      NVMM_LAUNCH(kernel, batch.first[batch.tensors], block_size(chunk_elements / V, 512), 0,
                  parameters[0], batch, step);
    });
  });
}

}  // namespace

NVMM_CUDA_LIBRARY(m) { m.impl("adamw", TORCH_BOX(&adamw)); }

}  // namespace nvmm
