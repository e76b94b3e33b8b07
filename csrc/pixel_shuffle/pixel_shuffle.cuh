// Blocks of a grid into the channels of tokens, and back. One block for a token.
#pragma once

#include "device.h"
#include "pixel_shuffle.h"

namespace nvmm {

// into_tokens: `from` is the grid and `to` the tokens; else the other way round.
template <class T, int V, bool into_tokens>
__global__ void pixel_shuffle(const T* __restrict__ from, T* __restrict__ to, Shuffle shape) {
  const int64_t token = blockIdx.x;
  const int64_t column = token % shape.columns, row = token / shape.columns % shape.rows;
  const int64_t corner = token / (shape.columns * shape.rows) * shape.image +
                         row * shape.factor * shape.row + column * shape.factor * shape.column;
  const unsigned factor = shape.factor, items = shape.channels / V;
  for (unsigned at = threadIdx.x; at < factor * factor * items; at += blockDim.x) {
    const unsigned pixel = at / items;
    const int64_t in_grid = corner + pixel / factor * shape.row + pixel % factor * shape.column +
                            int64_t{at % items} * V;
    const int64_t in_tokens = token * factor * factor * shape.channels + int64_t{at} * V;
    copy<V>(from + (into_tokens ? in_grid : in_tokens), to + (into_tokens ? in_tokens : in_grid));
  }
}

}  // namespace nvmm
