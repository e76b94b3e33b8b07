// Rotary position embedding of q and k. One block for a token, whose heads turn by the same angles.
#pragma once

#include "device.h"
#include "rope.h"

namespace nvmm {

// (a, b) -> (a cos - b sin, b cos + a sin) for channels i and i + half of each head; the channels
// from 2 half on are copied.
template <class T, int V>
__global__ void rope(const T* __restrict__ q, const T* __restrict__ k,
                     const float* __restrict__ table, T* __restrict__ q_out, T* __restrict__ k_out,
                     RopeShape shape) {
  const unsigned row = blockIdx.x / static_cast<unsigned>(shape.columns);
  const unsigned column = blockIdx.x % static_cast<unsigned>(shape.columns);
  q += row * shape.q.row + column * shape.q.column;
  k += row * shape.k.row + column * shape.k.column;
  table += row * shape.table_row + column * shape.table_column;
  q_out += int64_t{blockIdx.x} * shape.q.count * shape.width;
  k_out += int64_t{blockIdx.x} * shape.k.count * shape.width;
  const unsigned queries = shape.q.count, heads = queries + shape.k.count;
  const unsigned items = (shape.width - shape.half) / V;  // pairs of packs, then packs to copy
  for (unsigned at = threadIdx.x; at < heads * items; at += blockDim.x) {
    const unsigned head = at / items;
    // Whole packs from the head's start: of another sum nvcc splits the second half's stores.
    const int64_t i = int64_t{at % items} * V, second = (at % items + shape.half / V) * V;
    const bool of_q = head < queries;
    const T* from = of_q ? q + head * shape.q.head : k + (head - queries) * shape.k.head;
    T* to = of_q ? q_out + head * shape.width : k_out + (head - queries) * shape.width;
    if (i >= shape.half) {
      copy<V>(from + second, to + second);
      continue;
    }
    float a[V], b[V], cosine[V], sine[V];
    load<V>(from + i, a);
    load<V>(from + second, b);
    load<V>(table + i, cosine);
    load<V>(table + second, sine);
#pragma unroll
    for (int n = 0; n < V; ++n) {
      const float first = a[n], turn = shape.direction * sine[n];
      a[n] = first * cosine[n] - b[n] * turn;
      b[n] = b[n] * cosine[n] + first * turn;
    }
    store<V>(a, to + i);
    store<V>(b, to + second);
  }
}

}  // namespace nvmm
