// What both implementations of the list operations check: L2 norm and scaling, as Apex's amp_C has.
#pragma once

#include <cmath>

#include "lists.h"

namespace nvmm {

inline void check_flag(const Tensor& flag, const List& tensors) {
  STD_TORCH_CHECK(flag.numel() == 1 && flag.scalar_type() == ScalarType::Int &&
                      (tensors.empty() || flag.device() == tensors[0].device()),
                  "multi_tensor: the flag must be one int32 beside the tensors");
}

// Calls f(A{}, B{}) for the dtypes that source and target lists have.
template <bool half, class F>
void dispatch_scale(const List& sources, const List& targets, const F& f) {
  STD_TORCH_CHECK(sources.size() == targets.size(), "multi_tensor_scale: lists differ in length");
  if (sources.empty()) return;
  check_list("multi_tensor_scale: sources", sources, sources, sources[0].scalar_type());
  check_list("multi_tensor_scale: targets", targets, sources, targets[0].scalar_type());
  dispatch<half>(sources[0], [&](auto a) { dispatch<half>(targets[0], [&](auto b) { f(a, b); }); });
}

}  // namespace nvmm
