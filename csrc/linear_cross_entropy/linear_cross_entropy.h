// What both implementations of the chunks' softmax check.
#pragma once

#include "tensors.h"

namespace nvmm {

// Columns of a chunk: column c is vocabulary id first + c; those from valid on are padding.
struct Columns {
  int64_t stride, first, valid;
};

inline Columns check_logits(const Tensor& logits, const Tensor& labels, int64_t first,
                            int64_t valid, std::initializer_list<const Tensor*> rows) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && labels.is_contiguous() &&
                      labels.numel() == logits.size(0) && labels.scalar_type() == ScalarType::Long &&
                      labels.device() == logits.device(),
                  "linear_cross_entropy: contiguous logits [rows, columns] and int64 labels [rows]");
  for (const Tensor* row : rows) {
    STD_TORCH_CHECK(is_statistic(*row, logits.size(0), logits),
                    "linear_cross_entropy: row statistics must be contiguous float32 [rows]");
  }
  STD_TORCH_CHECK(0 <= valid && valid <= logits.size(1), "linear_cross_entropy: valid columns");
  return {logits.size(1), first, valid};
}

}  // namespace nvmm
