// What every csrc/<op>/bindings.cpp needs. Such a file defines bind_<op>, which csrc/bindings.cpp and
// csrc/cuda_bindings.cpp call: the functions of both modules have the same arguments,
//     (dtype and stream, sizes, options…, gradients of the outputs (of a backward), inputs, outputs)
// and tensors come in the order of the op's inputs (mvar_kernels/ops/<op>/inputs.py) unless a comment says otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "common/dtype.h"
#include "common/instruction_set.h"
#include "common/tensors.h"
#include "common/views.h"

namespace mvar {

// The instruction set in use: the index of an op's MVAR_TABLES.
extern InstructionSet current;

// dtype_and_stream() in mvar_kernels/ffi.py. The stream is null on a CPU.
struct DtypeAndStream {
  Dtype dtype;
  void* stream;

  explicit DtypeAndStream(const py::tuple& pair) : dtype(checked(entry(pair, 0))), stream((void*)entry(pair, 1)) {}
  int64_t itemsize() const { return kItemsizes[dtype]; }

  static Dtype checked(int64_t index) {
    if (index < 0 || index >= kDtypes) throw py::value_error("no dtype has the index " + std::to_string(index));
    return Dtype(index);
  }
};

// A kernel of a table, whose entries for dtypes that it does not take are null.
template <typename Kernel>
Kernel* present(Kernel* kernel) {
  if (kernel == nullptr) throw py::value_error("there is no kernel for this dtype");
  return kernel;
}

// Tokens per scale, which must add up to L.
inline std::vector<int64_t> scale_lengths(const py::tuple& scales, int64_t L) {
  std::vector<int64_t> lengths(scales.size());
  int64_t rest = L;
  for (size_t i = 0; i < lengths.size(); ++i) {
    lengths[i] = entry(scales, i);
    if (lengths[i] < 1 || lengths[i] > rest) throw py::value_error("scales: expected to add up to the tokens");
    rest -= lengths[i];
  }
  if (rest != 0) throw py::value_error("scales: expected to add up to the tokens");
  return lengths;
}

}  // namespace mvar
