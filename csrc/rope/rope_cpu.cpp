#include "loops.h"
#include "rope.h"

namespace nvmm {
namespace {

// One token's heads: channels i and i + half of each turn, those from 2 half on are copied.
template <class T>
NVMM_LOOP void turn(const T* x, const Heads& heads, T* y, const float* table,
                    const RopeShape& shape) {
  const int64_t half = shape.half;
  for (int64_t head = 0; head < heads.count; ++head) {
    const T* from = x + head * heads.head;
    T* to = y + head * shape.width;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = get(from + i), b = get(from + half + i);
      const float cosine = table[i], sine = shape.direction * table[half + i];
      put(a * cosine - b * sine, to + i);
      put(b * cosine + a * sine, to + half + i);
    }
    std::copy(from + 2 * half, from + shape.width, to + 2 * half);
  }
}

RopeOutputs rope(const Tensor& q_, const Tensor& k_, const Tensor& table_, bool inverse) {
  const Tensor q = dense_rows(q_), k = dense_rows(k_), table = dense_rows(table_);
  const RopeShape shape = rope_shape(q, k, table, inverse);
  const RopeOutputs out = rope_outputs(q, k);
  const auto& [q_out, k_out] = out;
  const int64_t elements = (shape.q.count + shape.k.count) * shape.width;
  dispatch<false>(q, [&](auto zero) {
    using T = decltype(zero);
    const T *qs = pointer<T>(q), *ks = pointer<T>(k);
    const float* tables = pointer<float>(table);
    T *q_to = target<T>(q_out), *k_to = target<T>(k_out);
    torch::stable::parallel_for(0, shape.tokens(), grain(elements), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t row = token / shape.columns, column = token % shape.columns;
        const float* angles = tables + row * shape.table_row + column * shape.table_column;
        turn(qs + row * shape.q.row + column * shape.q.column, shape.q,
             q_to + token * shape.q.count * shape.width, angles, shape);
        turn(ks + row * shape.k.row + column * shape.k.column, shape.k,
             k_to + token * shape.k.count * shape.width, angles, shape);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

}  // namespace nvmm
