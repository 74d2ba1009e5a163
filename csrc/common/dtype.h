// The numbers that kernels are compiled for: the index of a table's entries, as mvar_kernels/binding.py passes it.
#pragma once

namespace mvar {

enum Dtype { kFloat32, kBfloat16, kFloat16, kDtypes };

}  // namespace mvar
