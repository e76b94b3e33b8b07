// Lists of tensors that one operation walks as a whole, whatever the sizes of its tensors.
#pragma once

#include <vector>

#include "tensors.h"

namespace nvmm {

using List = std::vector<Tensor>;

// A piece of one tensor of a list.
struct Piece {
  size_t tensor;
  int64_t begin, end;
};

// Every tensor of `list` is contiguous, of `dtype`, and has the shape of the one of `like` in its
// place; all are where the first is.
inline void check_list(const char* what, const List& list, const List& like, ScalarType dtype) {
  STD_TORCH_CHECK(list.size() == like.size(), what, ": lists of different lengths");
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(list[i].scalar_type() == dtype, what, ": tensor ", i, " is of another dtype");
    STD_TORCH_CHECK(list[i].is_contiguous(), what, ": tensor ", i, " is not contiguous");
    STD_TORCH_CHECK(list[i].sizes() == like[i].sizes(), what, ": tensor ", i, " differs in size");
    STD_TORCH_CHECK(list[i].device() == like[0].device(), what, ": tensor ", i, " is elsewhere");
  }
}

// The list cut into pieces of at most `size` elements, in order: the same for any number of threads.
inline std::vector<Piece> pieces_of(const List& list, int64_t size) {
  std::vector<Piece> pieces;
  for (size_t t = 0; t < list.size(); ++t) {
    const int64_t count = list[t].numel();
    for (int64_t i = 0; i < count; i += size) pieces.push_back({t, i, std::min(i + size, count)});
  }
  return pieces;
}

template <class T>
std::vector<T*> addresses(const List& list) {
  std::vector<T*> found;
  for (const Tensor& tensor : list) found.push_back(target<T>(tensor));
  return found;
}

}  // namespace nvmm
