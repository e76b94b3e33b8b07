#include "linear_cross_entropy.h"

#include <limits>

#include "loops.h"

namespace nvmm {
namespace {

constexpr float lowest = -std::numeric_limits<float>::infinity();

template <class T>
NVMM_LOOP float largest(const T* logits, int64_t count) {
  float most = lowest;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    const float a = get(logits + i);
    most = a > most ? a : most;
  }
  return most;
}

template <class T>
NVMM_LOOP float sum_of_exponentials(const T* logits, int64_t count, float base) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exponential(get(logits + i) - base);
  return sum;
}

template <class T>
NVMM_LOOP void scaled_softmax(T* logits, int64_t count, float logsumexp, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    put(exponential(get(logits + i) - logsumexp) * scale, logits + i);
  }
}

void reduce(const Tensor& logits, const Tensor& labels, int64_t first, int64_t valid,
            Tensor maximum, Tensor total, Tensor picked) {
  const Columns columns =
      check_logits(logits, labels, first, valid, {&maximum, &total, &picked});
  dispatch<false>(logits, [&](auto zero) {
    using T = decltype(zero);
    const T* all = pointer<T>(logits);
    const int64_t* ids = pointer<int64_t>(labels);
    float *most = target<float>(maximum), *sum = target<float>(total);
    float* pick = target<float>(picked);
    torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = all + r * columns.stride;
        const float top = std::max(most[r], largest(row, columns.valid));
        const float base = top == lowest ? 0.f : top;
        sum[r] = sum[r] * std::exp(most[r] - base) + sum_of_exponentials(row, columns.valid, base);
        most[r] = top;
        const int64_t label = ids[r] - columns.first;
        if (0 <= label && label < columns.valid) pick[r] = get(row + label);
      }
    });
  });
}

void gradient(Tensor logits, const Tensor& labels, const Tensor& logsumexp, const Tensor& scale,
              int64_t first, int64_t valid) {
  const Columns columns = check_logits(logits, labels, first, valid, {&logsumexp, &scale});
  dispatch<false>(logits, [&](auto zero) {
    using T = decltype(zero);
    T* all = target<T>(logits);
    const int64_t* ids = pointer<int64_t>(labels);
    const float *level = pointer<float>(logsumexp), *factor = pointer<float>(scale);
    torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = all + r * columns.stride;
        if (factor[r] == 0.f) {
          std::fill(row, row + columns.stride, T(0.f));
          continue;
        }
        const int64_t label = ids[r] - columns.first;
        const bool here = 0 <= label && label < columns.valid;
        const float logit = here ? get(row + label) : 0.f;
        scaled_softmax(row, columns.valid, level[r], factor[r]);
        std::fill(row + columns.valid, row + columns.stride, T(0.f));
        // From the logit itself: p in T would have lost what p - 1 keeps.
        if (here) put((std::exp(logit - level[r]) - 1.f) * factor[r], row + label);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("logits_reduce", TORCH_BOX(&reduce));
  m.impl("logits_gradient", TORCH_BOX(&gradient));
}

}  // namespace nvmm
