#include "joint_norm.h"

#include <vector>

#include "loops.h"

namespace nvmm {
namespace {

template <class T>
NVMM_LOOP float squares_row(const T* x, int64_t count) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += get(x + i) * get(x + i);
  return sum;
}

template <class T>
NVMM_LOOP void apply_row(const T* x, const T* weight, float scale, T* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) put(get(x + i) * scale * get(weight + i), y + i);
}

// Returns the sum of dy * weight * normed x; adds dy * normed x to dweight.
template <class T>
NVMM_LOOP float sums_row(const T* dy, const T* x, const T* weight, float scale, float* dweight,
                         int64_t count) {
  float dot = 0.f;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < count; ++i) {
    const float along = get(dy + i) * get(x + i) * scale;
    dot += along * get(weight + i);
    dweight[i] += along;
  }
  return dot;
}

template <class T>
NVMM_LOOP void backward_row(const T* dy, const T* x, const T* weight, float scale, float dot, T* dx,
                            int64_t count) {
  const float along = scale * dot;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    put(scale * (get(dy + i) * get(weight + i) - get(x + i) * along), dx + i);
  }
}

Tensor squares(const Tensor& x_, int64_t real) {
  const Share share = share_of(x_, 0, real);
  const Tensor x = dense(x_), sums = floats(x, {share.rows});
  dispatch<false>(x, [&](auto zero) {
    const auto* xs = pointer<decltype(zero)>(x);
    float* out = target<float>(sums);
    torch::stable::parallel_for(0, share.rows, grain(share.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) out[r] = squares_row(xs + r * share.width, real);
    });
  });
  return sums;
}

Tensor apply(const Tensor& x_, const Tensor& weight_, const Tensor& scale, int64_t first,
             int64_t real) {
  const auto [share, x, weight] = joint(x_, weight_, scale, first, real);
  const Tensor y = torch::stable::empty_like(x);
  dispatch<false>(x, [&](auto zero) {
    using T = decltype(zero);
    const T *xs = pointer<T>(x), *ws = pointer<T>(weight) + first;
    const float* scales = pointer<float>(scale);
    T* ys = target<T>(y);
    torch::stable::parallel_for(0, share.rows, grain(share.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * share.width;
        apply_row(xs + at, ws, scales[r], ys + at, real);
        std::fill(ys + at + real, ys + at + share.width, T(0.f));
      }
    });
  });
  return y;
}

JointSums sums(const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& scale,
               int64_t first, int64_t real) {
  const JointGradient inputs = joint(dy_, x_, weight_, scale, first, real);
  const auto& [share, dy, x, weight] = inputs;
  JointSums found = joint_sums(inputs);
  auto& [dots, dweight] = found;
  const int64_t parts = parts_of(share.rows);
  std::vector<float> partial(parts * real);
  dispatch<false>(x, [&](auto zero) {
    using T = decltype(zero);
    const T *dys = pointer<T>(dy), *xs = pointer<T>(x), *ws = pointer<T>(weight) + first;
    const float* scales = pointer<float>(scale);
    float* out = target<float>(dots);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t r = share.rows * part / parts; r < share.rows * (part + 1) / parts; ++r) {
          const int64_t at = r * share.width;
          out[r] = sums_row(dys + at, xs + at, ws, scales[r], partial.data() + part * real, real);
        }
      }
    });
  });
  reduce_columns(partial.data(), parts, real, target<float>(dweight) + first);
  return found;
}

Tensor backward(const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& scale,
                const Tensor& dots, int64_t first, int64_t real) {
  const auto [share, dy, x, weight] = joint(dy_, x_, weight_, scale, first, real);
  check_rows(dots, share, x);
  const Tensor dx = torch::stable::empty_like(x);
  dispatch<false>(x, [&](auto zero) {
    using T = decltype(zero);
    const T *dys = pointer<T>(dy), *xs = pointer<T>(x), *ws = pointer<T>(weight) + first;
    const float *scales = pointer<float>(scale), *ds = pointer<float>(dots);
    T* dxs = target<T>(dx);
    torch::stable::parallel_for(0, share.rows, grain(share.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * share.width;
        backward_row(dys + at, xs + at, ws, scales[r], ds[r], dxs + at, real);
        std::fill(dxs + at + real, dxs + at + share.width, T(0.f));
      }
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("joint_norm_squares", TORCH_BOX(&squares));
  m.impl("joint_norm_apply", TORCH_BOX(&apply));
  m.impl("joint_norm_sums", TORCH_BOX(&sums));
  m.impl("joint_norm_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
