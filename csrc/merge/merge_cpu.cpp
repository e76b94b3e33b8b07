#include "merge.h"

#include <cstring>

#include "loops.h"

namespace nvmm {
namespace {

Tensor forward(const Tensor& base_, const Tensor& values_, const Tensor& source_) {
  const Tensor base = dense(base_), values = dense(values_), source = dense(source_);
  const Tensor out = merge_output(base, values, source);
  const int64_t width = out.size(1), base_rows = base.size(0);
  const int64_t bytes = width * static_cast<int64_t>(base.element_size());
  const char *bases = pointer<char>(base), *others = pointer<char>(values);
  const int64_t* from = pointer<int64_t>(source);
  char* to = target<char>(out);
  torch::stable::parallel_for(0, out.size(0), grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* row = from[r] < base_rows ? bases + from[r] * bytes
                                            : others + (from[r] - base_rows) * bytes;
      std::memcpy(to + r * bytes, row, bytes);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& target_, int64_t base_rows) {
  const Tensor dy = dense(dy_), where = dense(target_);
  const auto gradients = merge_gradients(dy, where, base_rows);
  const int64_t width = dy.size(1);
  const int64_t bytes = width * static_cast<int64_t>(dy.element_size());
  const char* from = pointer<char>(dy);
  const int64_t* rows = pointer<int64_t>(where);
  char *bases = target<char>(std::get<0>(gradients)), *others = target<char>(std::get<1>(gradients));
  torch::stable::parallel_for(0, where.numel(), grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* row = r < base_rows ? bases + r * bytes : others + (r - base_rows) * bytes;
      if (rows[r] < 0) {
        std::memset(row, 0, bytes);
      } else {
        std::memcpy(row, from + rows[r] * bytes, bytes);
      }
    }
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("merge", TORCH_BOX(&forward));
  m.impl("merge_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
