// The Python module mvar_kernels._cuda: the bindings of csrc/<op>/bindings.cpp, over csrc/<op>/cuda.cu. Apart from
// mvar_kernels._native so that neither build can break the other. It loads on machines without a GPU, too.

#include "common/binding.h"

namespace mvar {

void bind_adaln(py::module_& m);
void bind_mamba2(py::module_& m);
void bind_sample_tokens(py::module_& m);
void bind_scale_attention(py::module_& m);

InstructionSet current = kCuda;

}  // namespace mvar

PYBIND11_MODULE(MVAR_CUDA_MODULE, m) {
  m.doc() = "The CUDA kernels of mvar_kernels. Callers check their inputs: see mvar_kernels/ops/*/native.py.";
  mvar::bind_adaln(m);
  mvar::bind_mamba2(m);
  mvar::bind_sample_tokens(m);
  mvar::bind_scale_attention(m);
}
