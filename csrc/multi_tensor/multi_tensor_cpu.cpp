#include "multi_tensor.h"

#include <atomic>
#include <numeric>

#include "loops.h"

namespace nvmm {
namespace {

constexpr int64_t piece = 16384;  // elements of a task, and of a sum

// In float64: no square of a float32 overflows or vanishes. Four sums at once hide the latency of
// their additions.
template <class T>
NVMM_LOOP double sum_of_squares(const T* x, int64_t count) {
  const int64_t quarter = count / 4;
  const T *x1 = x + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
  double s0 = 0., s1 = 0., s2 = 0., s3 = 0.;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    const double a = get(x + i), b = get(x1 + i), c = get(x2 + i), d = get(x3 + i);
    s0 += a * a;
    s1 += b * b;
    s2 += c * c;
    s3 += d * d;
  }
  for (int64_t i = 4 * quarter; i < count; ++i) {
    const double a = get(x + i);
    s0 += a * a;
  }
  return (s0 + s1) + (s2 + s3);
}

// Whether every number of x is finite.
template <class A, class B>
NVMM_LOOP bool scale_piece(const A* x, B* y, int64_t count, float factor) {
  float most = 0.f;
#pragma omp simd reduction(+ : most)
  for (int64_t i = 0; i < count; ++i) {
    const float a = get(x + i);
    most += a * 0.f;  // 0, or NaN of an infinity or a NaN
    put(a * factor, y + i);
  }
  return most == 0.f;
}

// float32 [1]; sets the flag where the norm is not finite.
Tensor l2norm(List tensors, Tensor flag) {
  check_flag(flag, tensors);
  const Tensor norm = torch::stable::new_empty(flag, {1}, ScalarType::Float);
  const std::vector<Piece> pieces = pieces_of(tensors, piece);
  std::vector<double> sums(pieces.size());
  if (!tensors.empty()) {
    check_list("multi_tensor_l2norm", tensors, tensors, tensors[0].scalar_type());
    dispatch<false>(tensors[0], [&](auto zero) {
      const auto xs = addresses<decltype(zero)>(tensors);
      torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const auto [t, first, last] = pieces[i];
          sums[i] = sum_of_squares(xs[t] + first, last - first);
        }
      });
    });
  }
  const float found =
      static_cast<float>(std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.)));
  *target<float>(norm) = found;
  if (!std::isfinite(found)) *target<int32_t>(flag) = 1;
  return norm;
}

void scale(List sources, List targets, Tensor flag, double factor) {
  check_flag(flag, sources);
  const std::vector<Piece> pieces = pieces_of(sources, piece);
  std::atomic<bool> finite = true;
  dispatch_scale<false>(sources, targets, [&](auto a, auto b) {
    const auto xs = addresses<decltype(a)>(sources);
    const auto ys = addresses<decltype(b)>(targets);
    torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [t, first, last] = pieces[i];
        if (!scale_piece(xs[t] + first, ys[t] + first, last - first, static_cast<float>(factor))) {
          finite = false;
        }
      }
    });
  });
  if (!finite) *target<int32_t>(flag) = 1;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("multi_tensor_l2norm", TORCH_BOX(&l2norm));
  m.impl("multi_tensor_scale", TORCH_BOX(&scale));
}

}  // namespace nvmm
