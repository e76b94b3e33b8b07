#include "activation.h"
#include "loops.h"

namespace nvmm {
namespace {

template <Kind kind, class T>
NVMM_LOOP void forward(const T* x, const T* bias, T* y, int64_t width) {
  const bool biased = bias;
  if (!biased) bias = x;  // never added; lets the compiler load it without a branch
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    float a = get(x + i);
    if (biased) a += get(bias + i);
    float out = value<kind, Loops>(a);
    if constexpr (gated(kind)) {
      float up = get(x + width + i);
      if (biased) up += get(bias + width + i);
      out *= up;
    }
    put(out, y + i);
  }
}

template <Kind kind, class T>
NVMM_LOOP void backward(const T* dy, const T* x, const T* bias, T* dx, int64_t width) {
  const bool biased = bias;
  if (!biased) bias = x;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    float g = get(dy + i), a = get(x + i);
    if (biased) a += get(bias + i);
    if constexpr (gated(kind)) {
      float up = get(x + width + i);
      if (biased) up += get(bias + width + i);
      put(g * value<kind, Loops>(a), dx + width + i);
      g *= up;
    }
    put(g * slope<kind, Loops>(a), dx + i);
  }
}

Tensor activation(const Tensor& x_, const std::optional<Tensor>& bias_, int64_t kind_) {
  const Kind kind = static_cast<Kind>(kind_);
  const Tensor x = dense(x_), y = activation_output(x, bias_, kind);
  const auto bias = dense(bias_);
  const int64_t width = y.size(-1), stride = x.size(-1);
  dispatch<false>(x, [&](auto zero) {
    dispatch_kind(kind, [&](auto constant) {
      using T = decltype(zero);
      const T *xs = pointer<T>(x), *bs = pointer<T>(bias);
      T* ys = target<T>(y);
      torch::stable::parallel_for(0, rows_of(y), grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          forward<decltype(constant)::value>(xs + r * stride, bs, ys + r * width, width);
        }
      });
    });
  });
  return y;
}

Tensor activation_backward(const Tensor& dy_, const Tensor& x_, const std::optional<Tensor>& bias_,
                           int64_t kind_) {
  const Kind kind = static_cast<Kind>(kind_);
  const Tensor dy = dense(dy_), x = dense(x_), dx = torch::stable::empty_like(x);
  const auto bias = dense(bias_);
  const int64_t width = dy.size(-1), stride = x.size(-1);
  dispatch<false>(x, [&](auto zero) {
    dispatch_kind(kind, [&](auto constant) {
      using T = decltype(zero);
      const T *dys = pointer<T>(dy), *xs = pointer<T>(x), *bs = pointer<T>(bias);
      T* dxs = target<T>(dx);
      torch::stable::parallel_for(0, rows_of(dy), grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          backward<decltype(constant)::value>(dys + r * width, xs + r * stride, bs,
                                              dxs + r * stride, width);
        }
      });
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

}  // namespace nvmm
