// AdamW's arithmetic, for CPU and GPU, and what both implementations check.
#pragma once

#include <cmath>
#include <type_traits>

#include "formula.h"
#include "lists.h"

namespace nvmm {

// The numbers of one step, worked out in float64 and rounded once.
struct AdamStep {
  float l2;          // of the parameter, added to the gradient
  float decay;       // of the parameter, taken from it
  float rest1, beta2, rest2;  // 1 - beta1, beta2, 1 - beta2
  float size;        // learning rate / (1 - beta1^step)
  float root;        // 1 / sqrt(1 - beta2^step)
  float eps;
};

inline AdamStep adam_step(double lr, double beta1, double beta2, double eps, double weight_decay,
                          int64_t step, bool decoupled) {
  STD_TORCH_CHECK(step > 0, "adamw: step counts from 1");
  const auto f = [](double x) { return static_cast<float>(x); };
  return {decoupled ? 0.f : f(weight_decay),
          decoupled ? f(lr * weight_decay) : 0.f,
          f(1 - beta1),
          f(beta2),
          f(1 - beta2),
          f(lr / (1 - std::pow(beta1, step))),
          f(1 / std::sqrt(1 - std::pow(beta2, step))),
          f(eps)};
}

// The new parameter; m and v become the new running means.
NVMM_FORMULA float adam(float p, float g, float& m, float& v, const AdamStep& step) {
  g += step.l2 * p;
  m += step.rest1 * (g - m);
  v = step.beta2 * v + step.rest2 * g * g;
  return p - (step.decay * p + step.size * m / (sqrtf(v) * step.root + step.eps));
}

struct AdamLists {
  const List &parameters, &gradients, &masters, &means, &squares;

  bool mastered() const { return !masters.empty(); }
};

inline void check_adamw(const AdamLists& lists) {
  if (lists.parameters.empty()) return;
  const ScalarType dtype = lists.parameters[0].scalar_type();
  const ScalarType moments = lists.means.empty() ? dtype : lists.means[0].scalar_type();
  check_list("adamw: parameters", lists.parameters, lists.parameters, dtype);
  check_list("adamw: gradients", lists.gradients, lists.parameters, dtype);
  check_list("adamw: means", lists.means, lists.parameters, moments);
  check_list("adamw: squares", lists.squares, lists.parameters, moments);
  if (!lists.mastered()) return;
  STD_TORCH_CHECK(dtype != ScalarType::Float, "adamw: float32 parameters are their own masters");
  check_list("adamw: masters", lists.masters, lists.parameters, ScalarType::Float);
}

// Calls f(P{}, S{}, constant of mastered) for the dtypes of parameters and running means.
template <bool half, class F>
void dispatch_adamw(const AdamLists& lists, const F& f) {
  dispatch<half>(lists.parameters[0], [&](auto parameter) {
    dispatch<false>(lists.means[0], [&](auto moment) {
      if constexpr (std::is_same_v<decltype(parameter), float>) {
        f(parameter, moment, std::false_type{});
      } else if (lists.mastered()) {
        f(parameter, moment, std::true_type{});
      } else {
        f(parameter, moment, std::false_type{});
      }
    });
  });
}

}  // namespace nvmm
