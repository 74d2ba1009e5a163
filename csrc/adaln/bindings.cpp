#include "common/binding.h"

#include "adaln/adaln.h"

namespace mvar {
namespace {

// where: the dtype's index and, on a GPU, the stream
AdalnSizes sizes(const py::tuple& where, const py::tuple& shape, float eps) {
  return {entry(shape, 0), entry(shape, 1), entry(shape, 2), eps, (void*)entry(where, 1)};
}

const AdalnKernels* const adaln_tables[] = MVAR_TABLES(adaln);

const AdalnPair& plain(const py::tuple& where) { return adaln_tables[current]->plain[entry(where, 0)]; }
const AdalnPair& gated(const py::tuple& where) { return adaln_tables[current]->gated[entry(where, 0)]; }

void run(const AdalnPair& kernels, const AdalnForward& a, const AdalnSizes& n) {
  py::gil_scoped_release release;
  kernels.forward(a, n);
}

void run(const AdalnPair& kernels, const AdalnBackward& a, const AdalnSizes& n, Pointer workspace) {
  py::gil_scoped_release release;
  kernels.backward(a, n, (float*)workspace);
}

int64_t backward_workspace(const py::tuple& shape) {
  return adaln_tables[current]->backward_workspace({entry(shape, 0), entry(shape, 1), entry(shape, 2), 0.0f, nullptr});
}

// inputs: x, scale, shift; outputs: out
void adaln_forward(const py::tuple& where, const py::tuple& shape, float eps, const py::tuple& inputs,
                   const py::tuple& outputs) {
  const Tensors in(inputs), out(outputs);
  AdalnForward a{};
  a.x = in.tokens(0);
  a.scale = in.per_sample(1);
  a.shift = in.per_sample(2);
  a.out = out.tokens(0);
  run(plain(where), a, sizes(where, shape, eps));
}

// inputs: the gradient of out, x, scale; outputs: the gradients of x, scale, shift
void adaln_backward(const py::tuple& where, const py::tuple& shape, float eps, const py::tuple& inputs,
                    const py::tuple& outputs, Pointer workspace) {
  const Tensors in(inputs), out(outputs);
  AdalnBackward a{};
  a.grad_out = in.tokens(0);
  a.x = in.tokens(1);
  a.scale = in.per_sample(2);
  a.dx = out.tokens(0);
  a.dscale = out.per_sample(1);
  a.dshift = out.per_sample(2);
  run(plain(where), a, sizes(where, shape, eps), workspace);
}

// inputs: x, branch, gate, scale, shift; outputs: the new x, out
void gated_adaln_forward(const py::tuple& where, const py::tuple& shape, float eps, const py::tuple& inputs,
                         const py::tuple& outputs) {
  const Tensors in(inputs), out(outputs);
  AdalnForward a{};
  a.x = in.tokens(0);
  a.branch = in.tokens(1);
  a.gate = in.per_sample(2);
  a.scale = in.per_sample(3);
  a.shift = in.per_sample(4);
  a.x_new = out.tokens(0);
  a.out = out.tokens(1);
  run(gated(where), a, sizes(where, shape, eps));
}

// inputs: the gradients of the new x and of out, the new x, branch, gate, scale;
// outputs: the gradients of x, branch, gate, scale, shift
void gated_adaln_backward(const py::tuple& where, const py::tuple& shape, float eps, const py::tuple& inputs,
                          const py::tuple& outputs, Pointer workspace) {
  const Tensors in(inputs), out(outputs);
  AdalnBackward a{};
  a.grad_x_new = in.tokens(0);
  a.grad_out = in.tokens(1);
  a.x = in.tokens(2);
  a.branch = in.tokens(3);
  a.gate = in.per_sample(4);
  a.scale = in.per_sample(5);
  a.dx = out.tokens(0);
  a.dbranch = out.tokens(1);
  a.dgate = out.per_sample(2);
  a.dscale = out.per_sample(3);
  a.dshift = out.per_sample(4);
  run(gated(where), a, sizes(where, shape, eps), workspace);
}

}  // namespace

void bind_adaln(py::module_& m) {
  m.def("adaln_forward", &adaln_forward);
  m.def("gated_adaln_forward", &gated_adaln_forward);
  m.def("adaln_backward", &adaln_backward);
  m.def("gated_adaln_backward", &gated_adaln_backward);
  m.def("adaln_backward_workspace", &backward_workspace);
}

}  // namespace mvar
