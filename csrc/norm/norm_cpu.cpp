#include "loops.h"
#include "norm.h"

#include <vector>

namespace nvmm {
namespace {

struct Row {
  int64_t width;
  float eps, offset;
  bool rms;
};

// Returns {mean, rstd}; `sum` (x + residual in T) is written where there is a residual.
template <class T>
NVMM_LOOP std::pair<float, float> forward(const T* x, const T* residual, const T* weight,
                                          const T* bias, T* sum, T* y, Row row) {
  if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < row.width; ++i) put(get(x + i) + get(residual + i), sum + i);
    x = sum;
  }
  float mean = 0.f, squares = 0.f;
  if (!row.rms) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < row.width; ++i) mean += get(x + i);
    mean /= row.width;
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < row.width; ++i) squares += (get(x + i) - mean) * (get(x + i) - mean);
  const float rstd = 1.f / std::sqrt(squares / row.width + row.eps);
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < row.width; ++i) {
      put((get(x + i) - mean) * rstd * (get(weight + i) + row.offset) + get(bias + i), y + i);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < row.width; ++i) {
      put((get(x + i) - mean) * rstd * (get(weight + i) + row.offset), y + i);
    }
  }
  return {mean, rstd};
}

// dx of one row; adds dy * normed h to dweight and dy to dbias.
template <class T>
NVMM_LOOP void backward(const T* dy, const T* dsum, const T* h, const T* weight, float mean,
                        float rstd, T* dx, float* dweight, float* dbias, Row row) {
  float along = 0.f, level = 0.f;
#pragma omp simd reduction(+ : along, level)
  for (int64_t i = 0; i < row.width; ++i) {
    const float weighted = get(dy + i) * (get(weight + i) + row.offset);
    along += weighted * (get(h + i) - mean);
    level += weighted;
  }
  along *= rstd / row.width;
  level = row.rms ? 0.f : level / row.width;
#pragma omp simd
  for (int64_t i = 0; i < row.width; ++i) {
    const float g = get(dy + i), normed = (get(h + i) - mean) * rstd;
    float d = rstd * (g * (get(weight + i) + row.offset) - normed * along - level);
    if (dsum) d += get(dsum + i);
    put(d, dx + i);
    dweight[i] += g * normed;
    if (dbias) dbias[i] += g;
  }
}

NormOutputs norm(const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_,
                 const std::optional<Tensor>& bias_, double eps, bool rms, bool zero_centered) {
  check_norm(x_, residual_, weight_, bias_, rms);
  const Tensor x = dense(x_), weight = dense(weight_);
  const auto residual = dense(residual_), bias = dense(bias_);
  const NormOutputs out = norm_outputs(x, residual.has_value(), rms);
  const auto& [y, sum, mean, rstd] = out;
  const Row row{x.size(-1), static_cast<float>(eps), zero_centered ? 1.f : 0.f, rms};
  dispatch<false>(x, [&](auto zero) {
    using T = decltype(zero);
    const T *xs = pointer<T>(x), *rs = pointer<T>(residual), *ws = pointer<T>(weight),
            *bs = pointer<T>(bias);
    T *sums = target<T>(sum), *ys = target<T>(y);
    float *means = target<float>(mean), *rstds = target<float>(rstd);
    torch::stable::parallel_for(0, rows_of(x), 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * row.width;
        const auto [m, s] = forward<T>(xs + at, rs ? rs + at : nullptr, ws, bs,
                                       rs ? sums + at : nullptr, ys + at, row);
        rstds[r] = s;
        if (!rms) means[r] = m;
      }
    });
  });
  return out;
}

NormGradients norm_backward(const Tensor& dy_, const std::optional<Tensor>& dsum_,
                            const Tensor& h_, const Tensor& weight_, const Tensor& mean,
                            const Tensor& rstd, bool rms, bool zero_centered) {
  check_norm_backward(dy_, dsum_, h_, weight_, mean, rstd, rms);
  const Tensor dy = dense(dy_), h = dense(h_), weight = dense(weight_);
  const auto dsum = dense(dsum_);
  const Row row{h.size(-1), 0.f, zero_centered ? 1.f : 0.f, rms};
  const int64_t rows = rows_of(h), width = row.width;
  const Tensor dx = torch::stable::empty_like(h), dweight = torch::stable::empty_like(weight);
  const Tensor dbias =
      rms ? torch::stable::new_empty(weight, {0}) : torch::stable::empty_like(weight);
  const int64_t parts = parts_of(rows);
  std::vector<float> weights(parts * width), biases(rms ? 0 : parts * width);
  dispatch<false>(h, [&](auto zero) {
    using T = decltype(zero);
    const T *dys = pointer<T>(dy), *dsums = pointer<T>(dsum), *hs = pointer<T>(h),
            *ws = pointer<T>(weight);
    const float *means = pointer<float>(mean), *rstds = pointer<float>(rstd);
    T* dxs = target<T>(dx);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        float* dw = weights.data() + part * width;
        float* db = rms ? nullptr : biases.data() + part * width;
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
          const int64_t at = r * width;
          backward<T>(dys + at, dsums ? dsums + at : nullptr, hs + at, ws, rms ? 0.f : means[r],
                      rstds[r], dxs + at, dw, db, row);
        }
      }
    });
    reduce_columns(weights.data(), parts, width, target<T>(dweight));
    if (!rms) reduce_columns(biases.data(), parts, width, target<T>(dbias));
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace nvmm
