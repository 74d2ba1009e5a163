#include "common/binding.h"

#include "adaln/adaln.h"

namespace mvar {
namespace {

Tokens tokens(Pointer data, const py::tuple& strides) {
  return {(void*)data, entry(strides, 0), entry(strides, 1)};
}
Tokens tokens(Pointer data, const AdalnSizes& n) { return contiguous((void*)data, n.L, n.C); }

PerSample per_sample(Pointer data, const py::tuple& strides) { return {(void*)data, entry(strides, 0)}; }
PerSample per_sample(Pointer data, const AdalnSizes& n) { return contiguous((void*)data, n.C); }

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

void adaln_forward(const py::tuple& where, const py::tuple& shape, float eps, Pointer x, const py::tuple& x_strides,
                   Pointer scale, const py::tuple& scale_strides, Pointer shift,
                   const py::tuple& shift_strides, Pointer out) {
  const AdalnSizes n = sizes(where, shape, eps);
  AdalnForward a{};
  a.x = tokens(x, x_strides);
  a.scale = per_sample(scale, scale_strides);
  a.shift = per_sample(shift, shift_strides);
  a.out = tokens(out, n);
  run(plain(where), a, n);
}

void adaln_backward(const py::tuple& where, const py::tuple& shape, float eps, Pointer grad_out,
                    const py::tuple& grad_out_strides, Pointer x, const py::tuple& x_strides, Pointer scale,
                    const py::tuple& scale_strides, Pointer dx, Pointer dscale, Pointer dshift,
                    Pointer workspace) {
  const AdalnSizes n = sizes(where, shape, eps);
  AdalnBackward a{};
  a.grad_out = tokens(grad_out, grad_out_strides);
  a.x = tokens(x, x_strides);
  a.scale = per_sample(scale, scale_strides);
  a.dx = tokens(dx, n);
  a.dscale = per_sample(dscale, n);
  a.dshift = per_sample(dshift, n);
  run(plain(where), a, n, workspace);
}

void gated_adaln_forward(const py::tuple& where, const py::tuple& shape, float eps, Pointer x, const py::tuple& x_strides,
                         Pointer branch, const py::tuple& branch_strides, Pointer gate,
                         const py::tuple& gate_strides, Pointer scale, const py::tuple& scale_strides,
                         Pointer shift, const py::tuple& shift_strides, Pointer x_new, Pointer out) {
  const AdalnSizes n = sizes(where, shape, eps);
  AdalnForward a{};
  a.x = tokens(x, x_strides);
  a.branch = tokens(branch, branch_strides);
  a.gate = per_sample(gate, gate_strides);
  a.scale = per_sample(scale, scale_strides);
  a.shift = per_sample(shift, shift_strides);
  a.x_new = tokens(x_new, n);
  a.out = tokens(out, n);
  run(gated(where), a, n);
}

void gated_adaln_backward(const py::tuple& where, const py::tuple& shape, float eps, Pointer grad_x_new,
                          const py::tuple& grad_x_new_strides, Pointer grad_out,
                          const py::tuple& grad_out_strides, Pointer x_new, const py::tuple& x_new_strides,
                          Pointer branch, const py::tuple& branch_strides, Pointer gate,
                          const py::tuple& gate_strides, Pointer scale, const py::tuple& scale_strides,
                          Pointer dx, Pointer dbranch, Pointer dgate, Pointer dscale, Pointer dshift,
                          Pointer workspace) {
  const AdalnSizes n = sizes(where, shape, eps);
  AdalnBackward a{};
  a.grad_x_new = tokens(grad_x_new, grad_x_new_strides);
  a.grad_out = tokens(grad_out, grad_out_strides);
  a.x = tokens(x_new, x_new_strides);
  a.branch = tokens(branch, branch_strides);
  a.gate = per_sample(gate, gate_strides);
  a.scale = per_sample(scale, scale_strides);
  a.dx = tokens(dx, n);
  a.dbranch = tokens(dbranch, n);
  a.dgate = per_sample(dgate, n);
  a.dscale = per_sample(dscale, n);
  a.dshift = per_sample(dshift, n);
  run(gated(where), a, n, workspace);
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
