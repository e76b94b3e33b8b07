#include "multi_tensor.cuh"
#include "multi_tensor.h"

namespace nvmm {
namespace {

constexpr unsigned most_threads = 256;

int64_t chunks_of(const List& list) { return pieces_of(list, chunk_elements).size(); }

Tensor l2norm(List tensors, Tensor flag) {
  check_flag(flag, tensors);
  const Tensor norm = torch::stable::new_empty(flag, {1}, ScalarType::Float);
  const int64_t chunks = chunks_of(tensors);
  const Tensor sums = torch::stable::new_empty(flag, {chunks}, ScalarType::Double);
  const unsigned threads = block_size(most_threads, most_threads);
  const size_t scratch = threads * sizeof(double);
  if (chunks) {
    check_list("multi_tensor_l2norm", tensors, tensors, tensors[0].scalar_type());
    dispatch<true>(tensors[0], [&](auto zero) {
      using T = decltype(zero);
      for_batches<1>({&tensors}, [&](const Batch<1>& batch, int64_t before) {
        auto kernel = squares_reduce<T, wide<T>>;
        NVMM_LAUNCH(kernel, batch.first[batch.tensors], threads, scratch, flag, batch,
                    target<double>(sums) + before);
      });
    });
  }
  NVMM_LAUNCH(norm_reduce, 1, threads, scratch, flag, pointer<double>(sums), chunks,
              target<float>(norm), target<int>(flag));
  return norm;
}

void scale(List sources, List targets, Tensor flag, double factor) {
  check_flag(flag, sources);
  dispatch_scale<true>(sources, targets, [&](auto a, auto b) {
    using A = decltype(a);
    using B = decltype(b);
    constexpr int V = std::max(wide<A>, wide<B>);
    for_batches<2>({&sources, &targets}, [&](const Batch<2>& batch, int64_t) {
      auto kernel = scale_list<A, B, V>;
      NVMM_LAUNCH(kernel, batch.first[batch.tensors], block_size(chunk_elements / V, 512), 0, flag,
                  batch, static_cast<float>(factor), target<int>(flag));
    });
  });
}

}  // namespace

NVMM_CUDA_LIBRARY(m) {
  m.impl("multi_tensor_l2norm", TORCH_BOX(&l2norm));
  m.impl("multi_tensor_scale", TORCH_BOX(&scale));
}

}  // namespace nvmm
