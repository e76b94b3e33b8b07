// What the CPU and the CUDA implementation of rope share: checks, shapes and outputs.
#pragma once

#include "tensors.h"

namespace nvmm {

using RopeOutputs = std::tuple<Tensor, Tensor>;  // q, k

// Of [s, b, heads, d] with a contiguous last axis: how many heads, and strides in elements.
struct Heads {
  int64_t count, row, column, head;
};

struct RopeShape {
  int64_t rows, columns;  // s, b
  int64_t half, width;    // of a head: channels that turn / 2, all channels
  Heads q, k;
  int64_t table_row, table_column;
  float direction;  // -1 turns back

  int64_t tokens() const { return rows * columns; }
};

inline Heads heads_of(const Tensor& x) {
  return {x.size(2), x.stride(0), x.stride(1), x.stride(2)};
}

inline RopeShape rope_shape(const Tensor& q, const Tensor& k, const Tensor& table, bool inverse) {
  const auto agree = [&](const Tensor& x, int64_t axis) { return x.size(axis) == q.size(axis); };
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && table.dim() == 3 && agree(k, 0) &&
                      agree(k, 1) && agree(k, 3) && agree(table, 0) && agree(table, 1),
                  "rope: q must be [s, b, heads, d], k [s, b, groups, d], the table [s, b, dim]");
  STD_TORCH_CHECK(alike(k, q) && table.scalar_type() == ScalarType::Float &&
                      table.device() == q.device(),
                  "rope: q and k must agree in dtype, and the table be float32");
  const int64_t dim = table.size(2), width = q.size(3);
  STD_TORCH_CHECK(dim % 2 == 0 && dim <= width, "rope: dim must be even and at most d");
  return {q.size(0),   q.size(1),       dim / 2,         width,           heads_of(q),
          heads_of(k), table.stride(0), table.stride(1), inverse ? -1.f : 1.f};
}

inline RopeOutputs rope_outputs(const Tensor& q, const Tensor& k) {
  return {torch::stable::new_empty(q, q.sizes()), torch::stable::new_empty(k, k.sizes())};
}

}  // namespace nvmm
