#include "activation.h"
#include "loops.h"

namespace nvmm {
namespace {

template <Kind kind, class T>
NVMM_LOOP void forward(const T* x, const T* bias, T* y, int64_t width) {
  float a[columns_at_once], up[columns_at_once];
  for (int64_t first = 0; first < width; first += columns_at_once) {
    const int64_t count = std::min(width - first, columns_at_once), second = first + width;
    widen(x + first, bias ? bias + first : nullptr, a, count);
    if constexpr (gated(kind)) widen(x + second, bias ? bias + second : nullptr, up, count);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      a[i] = value<kind, Loops<T>>(a[i]);
      if constexpr (gated(kind)) a[i] *= up[i];
    }
    narrow(a, y + first, count);
  }
}

// dx of one row; adds it to dbias, where there is one.
template <Kind kind, class T>
NVMM_LOOP void backward(const T* dy, const T* x, const T* bias, T* dx, float* dbias,
                        int64_t width) {
  float g[columns_at_once], a[columns_at_once], up[columns_at_once];
  for (int64_t first = 0; first < width; first += columns_at_once) {
    const int64_t count = std::min(width - first, columns_at_once), second = first + width;
    widen<T>(dy + first, nullptr, g, count);
    widen(x + first, bias ? bias + first : nullptr, a, count);
    if constexpr (gated(kind)) widen(x + second, bias ? bias + second : nullptr, up, count);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float at = a[i];
      a[i] = g[i] * slope<kind, Loops<T>>(at);
      if constexpr (gated(kind)) {
        a[i] *= up[i];
        up[i] = g[i] * value<kind, Loops<T>>(at);
      }
    }
    narrow(a, dx + first, count);
    if constexpr (gated(kind)) narrow(up, dx + second, count);
    if (!dbias) continue;
    add_to(a, dbias + first, count);
    if constexpr (gated(kind)) add_to(up, dbias + second, count);
  }
}

Tensor activation(const Tensor& x_, const std::optional<Tensor>& bias_, int64_t kind_) {
  const Kind kind = static_cast<Kind>(kind_);
  const Tensor y = torch::stable::new_empty(x_, check_activation(x_, bias_, kind));
  const Tensor x = dense(x_);
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

ActivationGradients activation_backward(const Tensor& dy_, const Tensor& x_,
                                        const std::optional<Tensor>& bias_, int64_t kind_) {
  const Kind kind = static_cast<Kind>(kind_);
  check_activation_gradient(dy_, x_, bias_, kind);
  const Tensor dy = dense(dy_), x = dense(x_), dx = torch::stable::empty_like(x);
  const auto bias = dense(bias_);
  const int64_t width = dy.size(-1), stride = x.size(-1), rows = rows_of(dy);
  const Tensor dbias = torch::stable::new_empty(x, {bias ? stride : 0});
  const int64_t parts = parts_of(rows);
  std::vector<float> partial(bias ? parts * stride : 0);
  dispatch<false>(x, [&](auto zero) {
    using T = decltype(zero);
    const T *dys = pointer<T>(dy), *xs = pointer<T>(x), *bs = pointer<T>(bias);
    T* dxs = target<T>(dx);
    dispatch_kind(kind, [&](auto constant) {
      torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          float* sums = bias ? partial.data() + part * stride : nullptr;
          for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
            backward<decltype(constant)::value>(dys + r * width, xs + r * stride, bs,
                                                dxs + r * stride, sums, width);
          }
        }
      });
    });
    if (bias) reduce_columns(partial.data(), parts, stride, target<T>(dbias));
  });
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

}  // namespace nvmm
