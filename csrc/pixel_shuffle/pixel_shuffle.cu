#include "pixel_shuffle.cuh"
#include "launch.h"

namespace nvmm {
namespace {

template <bool into_tokens>
void run(const Tensor& from, const Tensor& to, const Shuffle& shape) {
  if (from.numel() == 0) return;
  dispatch<true>(from, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = packs<T>({shape.channels, shape.image, shape.row, shape.column},
                               {pointer<T>(from), pointer<T>(to)});
    auto kernel = fits ? pixel_shuffle<T, wide<T>, into_tokens> : pixel_shuffle<T, 1, into_tokens>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(shape.tokens()),
                block_size(fits ? shape.width() / wide<T> : shape.width(), 512), 0, from,
                pointer<T>(from), target<T>(to), shape);
  });
}

Tensor forward(const Tensor& x_, int64_t factor) {
  const Tensor x = dense_rows(x_);
  const Shuffle shape = shuffle_shape(x, factor);
  const Tensor tokens = shuffle_tokens(x, shape);
  run<true>(x, tokens, shape);
  return tokens;
}

Tensor backward(const Tensor& dy_, int64_t factor) {
  const Tensor dy = dense(dy_), dx = shuffle_grid(dy, factor);
  run<false>(dy, dx, shuffle_shape(dx, factor));
  return dx;
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("pixel_shuffle", TORCH_BOX(&forward));
  m.impl("pixel_shuffle_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
