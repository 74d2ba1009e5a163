// What every csrc/<op>/bindings.cpp needs. Such a file defines bind_<op>, which csrc/bindings.cpp calls.
//
// From Python a tensor comes as its data_ptr() and, where it is read in place, its stride(); outputs
// are contiguous.
#pragma once

#include <pybind11/pybind11.h>

#include "common/instruction_set.h"

namespace py = pybind11;

namespace mvar {

typedef uintptr_t Pointer;

// The instruction set in use: the index of an op's MVAR_TABLES.
extern InstructionSet current;

inline int64_t entry(const py::tuple& tuple, size_t i) { return py::cast<int64_t>(tuple[i]); }

}  // namespace mvar
