// The formulas of the activations, for CPU and GPU, and what both implementations check.
#pragma once

#include <type_traits>
#include <vector>

#include "formula.h"
#include "tensors.h"

namespace nvmm {

enum class Kind : int64_t { swiglu, geglu, squared_relu, gelu };

NVMM_BOTH_SIDES constexpr bool gated(Kind kind) { return kind == Kind::swiglu || kind == Kind::geglu; }

// f(x) and f'(x) of the function before the gate. Math: exp and normal of this side.
template <Kind kind, class Math>
NVMM_FORMULA float value(float x) {
  if constexpr (kind == Kind::swiglu) return x * (1.f / (1.f + Math::exp(-x)));
  if constexpr (kind == Kind::squared_relu) return x > 0.f ? x * x : (x != x ? x : 0.f);
  return x * Math::normal(x).below;
}

template <Kind kind, class Math>
NVMM_FORMULA float slope(float x) {
  if constexpr (kind == Kind::swiglu) {
    const float s = 1.f / (1.f + Math::exp(-x));
    return s * (1.f + x * (1.f - s));
  }
  if constexpr (kind == Kind::squared_relu) return x > 0.f ? 2.f * x : (x != x ? x : 0.f);
  const Normal normal = Math::normal(x);
  return normal.below + x * normal.density;
}

using ActivationGradients = std::tuple<Tensor, Tensor>;  // dx, dbias ([0] without a bias)

// Shape of the output.
inline std::vector<int64_t> check_activation(const Tensor& x, const std::optional<Tensor>& bias,
                                             Kind kind) {
  const bool halves = gated(kind);
  STD_TORCH_CHECK(x.dim() > 0 && (!halves || x.size(-1) % 2 == 0),
                  "activation: a gated activation halves the last axis, which must be even");
  STD_TORCH_CHECK(!bias || is_vector(*bias, x.size(-1), x),
                  "activation: the bias must have the length of x's last axis, and its dtype");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (halves) shape.back() /= 2;
  return shape;
}

inline void check_activation_gradient(const Tensor& dy, const Tensor& x,
                                      const std::optional<Tensor>& bias, Kind kind) {
  STD_TORCH_CHECK(dy.sizes() == check_activation(x, bias, kind) && alike(dy, x),
                  "activation: the gradient must have the output's shape and dtype");
}

// Calls f with the kind as a constant.
template <class F>
void dispatch_kind(Kind kind, const F& f) {
  switch (kind) {
    case Kind::swiglu:
      return f(std::integral_constant<Kind, Kind::swiglu>{});
    case Kind::geglu:
      return f(std::integral_constant<Kind, Kind::geglu>{});
    case Kind::squared_relu:
      return f(std::integral_constant<Kind, Kind::squared_relu>{});
    case Kind::gelu:
      return f(std::integral_constant<Kind, Kind::gelu>{});
  }
  STD_TORCH_CHECK(false, "activation: unknown kind");
}

}  // namespace nvmm
