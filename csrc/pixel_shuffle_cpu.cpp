#include "pixel_shuffle.h"

#include <cstring>

#include "loops.h"

namespace nvmm {
namespace {

// Calls move(pixel's place in the grid, its place in the tokens), both in elements, for each pixel.
template <class F>
void each_pixel(const Shuffle& shape, const F& move) {
  torch::stable::parallel_for(
      0, shape.tokens(), grain(shape.width()), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
          const int64_t row = token / shape.columns % shape.rows * shape.factor;
          const int64_t column = token % shape.columns * shape.factor;
          const int64_t image = token / (shape.columns * shape.rows) * shape.image;
          for (int64_t pixel = 0; pixel < shape.factor * shape.factor; ++pixel) {
            move(image + (row + pixel / shape.factor) * shape.row +
                     (column + pixel % shape.factor) * shape.column,
                 token * shape.width() + pixel * shape.channels);
          }
        }
      });
}

Tensor forward(const Tensor& x_, int64_t factor) {
  const Tensor x = dense_rows(x_);
  const Shuffle shape = shuffle_shape(x, factor);
  const Tensor tokens = shuffle_tokens(x, shape);
  const int64_t size = x.element_size();
  const char* from = pointer<char>(x);
  char* to = target<char>(tokens);
  each_pixel(shape, [&](int64_t in_grid, int64_t in_tokens) {
    std::memcpy(to + in_tokens * size, from + in_grid * size, shape.channels * size);
  });
  return tokens;
}

Tensor backward(const Tensor& dy_, int64_t factor) {
  const Tensor dy = dense(dy_), dx = shuffle_grid(dy, factor);
  const Shuffle shape = shuffle_shape(dx, factor);
  const int64_t size = dy.element_size();
  const char* from = pointer<char>(dy);
  char* to = target<char>(dx);
  each_pixel(shape, [&](int64_t in_grid, int64_t in_tokens) {
    std::memcpy(to + in_grid * size, from + in_tokens * size, shape.channels * size);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvmm, CPU, m) {
  m.impl("pixel_shuffle", TORCH_BOX(&forward));
  m.impl("pixel_shuffle_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
