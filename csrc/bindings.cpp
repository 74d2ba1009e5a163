// The Python module mvar_kernels._native: pointers and sizes in, nothing decided here. It knows
// nothing of torch, so one build serves every version of it.

#include <string>

#include "common/binding.h"

namespace mvar {

void bind_adaln(py::module_& m);
void bind_group_norm_silu(py::module_& m);
void bind_mamba2(py::module_& m);
void bind_sample_tokens(py::module_& m);
void bind_scale_attention(py::module_& m);

namespace {

InstructionSet best() {
  int set = kInstructionSets - 1;
  while (!supported(InstructionSet(set))) --set;
  return InstructionSet(set);
}

}  // namespace

InstructionSet current = best();

namespace {

void use_instruction_set(const std::string& name) {
  for (int set = 0; set < kInstructionSets; ++set) {
    if (name != kInstructionSetNames[set]) continue;
    if (!supported(InstructionSet(set))) throw py::value_error("this machine does not support " + name);
    current = InstructionSet(set);
    return;
  }
  throw py::value_error("no instruction set of this build is called '" + name + "'");
}

py::dict build_info() {
  py::tuple sets(int{kInstructionSets});
  for (int set = 0; set < kInstructionSets; ++set) sets[set] = kInstructionSetNames[set];
  py::dict info;
  info["compiler"] = MVAR_COMPILER;
  info["openmp"] = bool(MVAR_OPENMP);
  info["instruction_sets"] = sets;
  return info;
}

}  // namespace
}  // namespace mvar

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ kernels of mvar_kernels. Callers check their inputs: see mvar_kernels/ops/*/native.py.";
  m.def("build_info", &mvar::build_info);
  m.def("instruction_set", [] { return mvar::kInstructionSetNames[mvar::current]; });
  m.def("use_instruction_set", &mvar::use_instruction_set, py::arg("name"));
  mvar::bind_adaln(m);
  mvar::bind_group_norm_silu(m);
  mvar::bind_mamba2(m);
  mvar::bind_sample_tokens(m);
  mvar::bind_scale_attention(m);
}
