#include "rope.cuh"
#include "launch.h"

namespace nvmm {
namespace {

RopeOutputs forward(const Tensor& q_, const Tensor& k_, const Tensor& table_, bool inverse) {
  const Tensor q = dense_rows(q_), k = dense_rows(k_), table = dense_rows(table_);
  const RopeShape shape = rope_shape(q, k, table, inverse);
  const RopeOutputs out = rope_outputs(q, k);
  const auto& [q_out, k_out] = out;
  if (q.numel() + k.numel() == 0) return out;
  dispatch<true>(q, [&](auto zero) {
    using T = decltype(zero);
    const auto& [q_count, q_row, q_column, q_head] = shape.q;
    const auto& [k_count, k_row, k_column, k_head] = shape.k;
    const bool fits = packs<T>({shape.half, shape.width, q_row, q_column, q_head, k_row, k_column,
                                k_head, shape.table_row, shape.table_column},
                               {pointer<T>(q), pointer<T>(k), pointer<float>(table)});
    const int64_t items = (q_count + k_count) * (shape.width - shape.half);
    auto kernel = fits ? rope<T, wide<T>> : rope<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(shape.tokens()),
                block_size(fits ? items / wide<T> : items, 256), 0, q, pointer<T>(q), pointer<T>(k),
                pointer<float>(table), target<T>(q_out), target<T>(k_out), shape);
  });
  return out;
}

}  // namespace

NVMM_CUDA_LIBRARY(m) { m.impl("rope", TORCH_BOX(&forward)); }

}  // namespace nvmm
