#include "adamw.h"

#include "loops.h"

namespace nvmm {
namespace {

constexpr int64_t piece = 16384;  // elements of a task: a tenth of a millisecond or less

// The parameters are `master` rounded, where there is one.
template <class P, class S, bool mastered>
NVMM_LOOP void update(P* parameter, const P* gradient, float* master, S* mean, S* square,
                      int64_t count, AdamStep step) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float m = get(mean + i), v = get(square + i);
    const float before = mastered ? master[i] : get(parameter + i);
    const float p = adam(before, get(gradient + i), m, v, step);
    if (mastered) master[i] = p;
    put(p, parameter + i);
    put(m, mean + i);
    put(v, square + i);
  }
}

void adamw(List parameters, List gradients, List masters, List means, List squares, double lr,
           double beta1, double beta2, double eps, double weight_decay, int64_t step_,
           bool decoupled) {
  const AdamLists lists{parameters, gradients, masters, means, squares};
  check_adamw(lists);
  const std::vector<Piece> pieces = pieces_of(parameters, piece);
  if (pieces.empty()) return;
  const AdamStep step = adam_step(lr, beta1, beta2, eps, weight_decay, step_, decoupled);
  dispatch_adamw<false>(lists, [&](auto p, auto s, auto mastered) {
    using P = decltype(p);
    using S = decltype(s);
    const auto ps = addresses<P>(parameters), gs = addresses<P>(gradients);
    const auto ws = addresses<float>(masters);
    const auto ms = addresses<S>(means), vs = addresses<S>(squares);
    torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [t, first, last] = pieces[i];
        update<P, S, decltype(mastered)::value>(
            ps[t] + first, gs[t] + first, mastered ? ws[t] + first : nullptr, ms[t] + first,
            vs[t] + first, last - first, step);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) { m.impl("adamw", TORCH_BOX(&adamw)); }

}  // namespace nvmm
