#include "joint_norm.cuh"
#include "columns.cuh"
#include "launch.h"

namespace nvmm {
namespace {

// Packs only where rows, real columns and the weight's part start and end on 16 bytes.
template <class T>
bool joint_packs(const Share& share, std::initializer_list<const void*> pointers) {
  return packs<T>(share.width, pointers) && share.real % wide<T> == 0 &&
         share.first % wide<T> == 0;
}

template <class T>
unsigned threads_of(const Share& share, bool fits) {
  return block_size(fits ? share.width / wide<T> : share.width, 512);
}

Tensor squares(const Tensor& x_, int64_t real) {
  const Share share = share_of(x_, 0, real);
  const Tensor x = dense(x_), sums = floats(x, {share.rows});
  if (share.rows == 0) return sums;
  dispatch<true>(x, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = joint_packs<T>(share, {pointer<T>(x)});
    auto kernel = fits ? joint_squares_reduce<T, wide<T>> : joint_squares_reduce<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(share.rows), threads_of<T>(share, fits),
                scratch_bytes, x, pointer<T>(x), target<float>(sums), share);
  });
  return sums;
}

Tensor apply(const Tensor& x_, const Tensor& weight_, const Tensor& scale, int64_t first,
             int64_t real) {
  const auto [share, x, weight] = joint(x_, weight_, scale, first, real);
  const Tensor y = torch::stable::empty_like(x);
  if (share.rows == 0) return y;
  dispatch<true>(x, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = joint_packs<T>(share, {pointer<T>(x), pointer<T>(weight)});
    auto kernel = fits ? joint_apply<T, wide<T>> : joint_apply<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(share.rows), threads_of<T>(share, fits), 0, x,
                pointer<T>(x), pointer<T>(weight), pointer<float>(scale), target<T>(y), share);
  });
  return y;
}

JointSums sums(const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& scale,
               int64_t first, int64_t real) {
  const JointGradient inputs = joint(dy_, x_, weight_, scale, first, real);
  const auto& [share, dy, x, weight] = inputs;
  JointSums found = joint_sums(inputs);
  auto& [dots, dweight] = found;
  if (share.rows == 0) return found;
  const Tensor partial = floats(x, {grid_size(share.rows), 1, real});
  dispatch<true>(x, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = joint_packs<T>(share, {pointer<T>(x), pointer<T>(dy), pointer<T>(weight)});
    auto kernel = fits ? joint_sums_reduce<T, wide<T>> : joint_sums_reduce<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(partial.size(0)), threads_of<T>(share, fits),
                scratch_bytes, x, pointer<T>(dy), pointer<T>(x), pointer<T>(weight),
                pointer<float>(scale), target<float>(dots), target<float>(partial), share);
  });
  if (real) reduce_columns<float>(partial, 0, torch::stable::narrow(dweight, 0, first, real));
  return found;
}

Tensor backward(const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& scale,
                const Tensor& dots, int64_t first, int64_t real) {
  const auto [share, dy, x, weight] = joint(dy_, x_, weight_, scale, first, real);
  check_rows(dots, share, x);
  const Tensor dx = torch::stable::empty_like(x);
  if (share.rows == 0) return dx;
  dispatch<true>(x, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = joint_packs<T>(share, {pointer<T>(x), pointer<T>(dy), pointer<T>(weight)});
    auto kernel = fits ? joint_backward<T, wide<T>> : joint_backward<T, 1>;
    NVMM_LAUNCH(kernel, static_cast<unsigned>(share.rows), threads_of<T>(share, fits), 0, x,
                pointer<T>(dy), pointer<T>(x), pointer<T>(weight), pointer<float>(scale),
                pointer<float>(dots), target<T>(dx), share);
  });
  return dx;
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("joint_norm_squares", TORCH_BOX(&squares));
  m.impl("joint_norm_apply", TORCH_BOX(&apply));
  m.impl("joint_norm_sums", TORCH_BOX(&sums));
  m.impl("joint_norm_backward", TORCH_BOX(&backward));
}

}  // namespace nvmm
