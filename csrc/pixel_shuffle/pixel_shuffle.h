// What the CPU and the CUDA implementation of pixel shuffle share: checks, shapes and outputs.
#pragma once

#include "tensors.h"

namespace nvmm {

// A grid [n, rows factor, columns factor, channels] with a contiguous last axis, and its tokens
// [n, rows, columns, factor factor channels], which are contiguous.
struct Shuffle {
  int64_t n, rows, columns, factor, channels;
  int64_t image, row, column;  // strides of the grid, in elements

  int64_t tokens() const { return n * rows * columns; }
  int64_t width() const { return factor * factor * channels; }
};

// x: the grid.
inline Shuffle shuffle_shape(const Tensor& x, int64_t factor) {
  STD_TORCH_CHECK(x.dim() == 4 && factor > 0 && x.size(1) % factor == 0 && x.size(2) % factor == 0,
                  "pixel_shuffle: the factor must divide the grid [n, rows, columns, channels]");
  return {x.size(0), x.size(1) / factor, x.size(2) / factor, factor, x.size(3),
          x.stride(0), x.stride(1), x.stride(2)};
}

inline Tensor shuffle_tokens(const Tensor& x, const Shuffle& shape) {
  return torch::stable::new_empty(x, {shape.n, shape.rows, shape.columns, shape.width()});
}

// The grid of tokens dy, to be filled.
inline Tensor shuffle_grid(const Tensor& dy, int64_t factor) {
  STD_TORCH_CHECK(dy.dim() == 4 && factor > 0 && dy.size(3) % (factor * factor) == 0,
                  "pixel_shuffle: tokens must be [n, rows, columns, factor^2 channels]");
  return torch::stable::new_empty(dy, {dy.size(0), dy.size(1) * factor, dy.size(2) * factor,
                                       dy.size(3) / (factor * factor)});
}

}  // namespace nvmm
