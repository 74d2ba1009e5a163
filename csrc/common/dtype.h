// The numbers that kernels are compiled for: the index of a table's entries, as mvar_kernels/ffi.py passes it.
#pragma once

#include <stdint.h>

namespace mvar {

enum Dtype { kFloat32, kBfloat16, kFloat16, kDtypes };
constexpr int64_t kItemsizes[kDtypes] = {4, 2, 2};

}  // namespace mvar
