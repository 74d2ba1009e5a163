// What every csrc/<op>/bindings.cpp needs. Such a file defines bind_<op>, which csrc/bindings.cpp calls.
#pragma once

#include <pybind11/pybind11.h>

#include "common/instruction_set.h"
#include "common/views.h"

namespace py = pybind11;

namespace mvar {

typedef uintptr_t Pointer;

// The instruction set in use: the index of an op's MVAR_TABLES.
extern InstructionSet current;

inline int64_t entry(const py::tuple& tuple, size_t i) { return py::cast<int64_t>(tuple[i]); }

// A call's tensors, as pointers() in mvar_kernels/binding.py passes them: of each its data_ptr() and its stride().
class Tensors {
 public:
  explicit Tensors(const py::tuple& tensors) : tensors_(tensors) {}

  template <typename T>
  T* data(size_t i) const {
    return (T*)py::cast<Pointer>(tensor(i)[0]);
  }
  float* floats(size_t i) const { return data<float>(i); }
  py::tuple strides(size_t i) const { return py::reinterpret_borrow<py::tuple>(tensor(i)[1]); }

  Tokens tokens(size_t i) const {
    const py::tuple s = strides(i);
    return {data<void>(i), entry(s, 0), entry(s, 1)};
  }
  PerSample per_sample(size_t i) const { return {data<void>(i), entry(strides(i), 0)}; }
  Heads heads(size_t i) const {
    const py::tuple s = strides(i);
    return {data<void>(i), entry(s, 0), entry(s, 1), entry(s, 2)};
  }

 private:
  py::tuple tensor(size_t i) const { return py::reinterpret_borrow<py::tuple>(tensors_[i]); }

  const py::tuple& tensors_;
};

}  // namespace mvar
