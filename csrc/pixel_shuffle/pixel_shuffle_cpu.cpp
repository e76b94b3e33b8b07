#include "pixel_shuffle.h"

#include <cstring>

#include "loops.h"

namespace nvmm {
namespace {

// Copies each pixel of the grid to its place in the tokens, or back.
template <bool into_tokens>
Tensor run(const Tensor& from, const Tensor& to, const Shuffle& shape) {
  const int64_t size = from.element_size(), bytes = shape.channels * size;
  const char* source = pointer<char>(from);
  char* out = target<char>(to);
  torch::stable::parallel_for(
      0, shape.tokens(), grain(shape.width()), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
          const int64_t row = token / shape.columns % shape.rows * shape.factor;
          const int64_t column = token % shape.columns * shape.factor;
          const int64_t image = token / (shape.columns * shape.rows) * shape.image;
          for (int64_t pixel = 0; pixel < shape.factor * shape.factor; ++pixel) {
            const int64_t in_grid = image + (row + pixel / shape.factor) * shape.row +
                                    (column + pixel % shape.factor) * shape.column;
            const int64_t in_tokens = token * shape.width() + pixel * shape.channels;
            std::memcpy(out + (into_tokens ? in_tokens : in_grid) * size,
                        source + (into_tokens ? in_grid : in_tokens) * size, bytes);
          }
        }
      });
  return to;
}

Tensor forward(const Tensor& x_, int64_t factor) {
  const Tensor x = dense_rows(x_);
  const Shuffle shape = shuffle_shape(x, factor);
  return run<true>(x, shuffle_tokens(x, shape), shape);
}

Tensor backward(const Tensor& dy_, int64_t factor) {
  const Tensor dy = dense(dy_), dx = shuffle_grid(dy, factor);
  return run<false>(dy, dx, shuffle_shape(dx, factor));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("pixel_shuffle", TORCH_BOX(&forward));
  m.impl("pixel_shuffle_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
