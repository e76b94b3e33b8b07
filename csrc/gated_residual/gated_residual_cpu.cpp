#include "gated_residual.h"

#include <vector>

#include "loops.h"

namespace nvmm {
namespace {

template <class T>
std::vector<float> gates(const Tensor& gate, int64_t width, bool tanh) {
  std::vector<float> out(width);
  for (int64_t i = 0; i < width; ++i) {
    const float a = get(pointer<T>(gate) + (gate.numel() == 1 ? 0 : i));
    out[i] = tanh ? std::tanh(a) : a;
  }
  return out;
}

template <class T>
std::vector<float> values(const std::optional<Tensor>& tensor, int64_t count, float otherwise) {
  std::vector<float> out(count, otherwise);
  for (int64_t i = 0; tensor && i < count; ++i) out[i] = get(pointer<T>(*tensor) + i);
  return out;
}

template <class T>
NVMM_LOOP void add(const T* residual, const T* branch, const float* bias, const float* gate,
                   float weight, T* y, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    put(get(residual + i) + weight * gate[i] * (get(branch + i) + bias[i]), y + i);
  }
}

// sums[0] += weight * dy * (branch + bias), sums[1] += weight * dy: [2, width].
template <class T>
NVMM_LOOP void backward_row(const T* dy, const T* branch, const float* bias, const float* gate,
                            float weight, T* dbranch, float* sums, int64_t width) {
  float* levels = sums + width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float d = weight * get(dy + i);
    sums[i] += d * (get(branch + i) + bias[i]);
    levels[i] += d;
    put(d * gate[i], dbranch + i);
  }
}

Tensor forward(const Tensor& residual_, const Tensor& branch_, const std::optional<Tensor>& bias_,
               const Tensor& gate_, const std::optional<Tensor>& mask_, bool tanh) {
  check_gated(residual_, branch_, bias_, gate_, mask_);
  const Tensor residual = dense(residual_), branch = dense(branch_), gate = dense(gate_);
  const auto bias = dense(bias_), mask = dense(mask_);
  const Tensor y = torch::stable::empty_like(residual);
  const int64_t rows = rows_of(branch), width = branch.size(-1);
  dispatch<false>(branch, [&](auto zero) {
    using T = decltype(zero);
    const T *rs = pointer<T>(residual), *fs = pointer<T>(branch);
    T* ys = target<T>(y);
    const auto g = gates<T>(gate, width, tanh);
    const auto b = values<T>(bias, width, 0.f), m = values<T>(mask, rows, 1.f);
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * width;
        if (m[r] == 0.f) {
          std::copy(rs + at, rs + at + width, ys + at);
        } else {
          add(rs + at, fs + at, b.data(), g.data(), m[r], ys + at, width);
        }
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& branch_,
                                    const std::optional<Tensor>& bias_, const Tensor& gate_,
                                    const std::optional<Tensor>& mask_, bool tanh) {
  check_gated(dy_, branch_, bias_, gate_, mask_);
  const Tensor dy = dense(dy_), branch = dense(branch_), gate = dense(gate_);
  const auto bias = dense(bias_), mask = dense(mask_);
  const int64_t rows = rows_of(branch), width = branch.size(-1), parts = parts_of(rows);
  const Tensor dbranch = torch::stable::empty_like(branch), sums = floats(branch, {2, width});
  std::vector<float> partial(parts * 2 * width);
  dispatch<false>(branch, [&](auto zero) {
    using T = decltype(zero);
    const T *dys = pointer<T>(dy), *fs = pointer<T>(branch);
    T* out = target<T>(dbranch);
    const auto g = gates<T>(gate, width, tanh);
    const auto b = values<T>(bias, width, 0.f), m = values<T>(mask, rows, 1.f);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
          const int64_t at = r * width;
          if (m[r] == 0.f) {
            std::fill(out + at, out + at + width, T(0.f));
          } else {
            backward_row(dys + at, fs + at, b.data(), g.data(), m[r], out + at,
                         partial.data() + part * 2 * width, width);
          }
        }
      }
    });
  });
  reduce_columns(partial.data(), parts, 2 * width, target<float>(sums));
  return {dbranch, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&forward));
  m.impl("gated_residual_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
