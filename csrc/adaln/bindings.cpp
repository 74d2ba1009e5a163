#include "common/binding.h"

#include "adaln/adaln.h"

namespace mvar {
namespace {

const AdalnKernels* const adaln_tables[] = MVAR_TABLES(adaln);

// A call's dtype and sizes, by which its tensors are read.
struct Call {
  const AdalnSizes n;
  const Dtype dtype;

  Call(const DtypeAndStream& at, const py::tuple& shape, float eps)
      : n{entry(shape, 0), entry(shape, 1), entry(shape, 2), eps, at.stream}, dtype(at.dtype) {}

  Tokens tokens(const Tensors& t, size_t i, const char* name) const {
    return t.tokens(i, name, {n.B, n.L, n.C}, kItemsizes[dtype]);
  }
  PerSample per_sample(const Tensors& t, size_t i, const char* name) const {
    return t.per_sample(i, name, {n.B, n.C}, kItemsizes[dtype]);
  }
  float* workspace(const Tensors& t, size_t i) const {
    return t.dense<float>(i, "workspace", {adaln_tables[current]->backward_workspace(n)});
  }

  void run(const AdalnPair& kernels, const AdalnForward& a) const {
    const auto kernel = present(kernels.forward);
    py::gil_scoped_release release;
    kernel(a, n);
  }
  void run(const AdalnPair& kernels, const AdalnBackward& a, float* workspace) const {
    const auto kernel = present(kernels.backward);
    py::gil_scoped_release release;
    kernel(a, n, workspace);
  }
};

int64_t backward_workspace(const py::tuple& shape) {
  return adaln_tables[current]->backward_workspace({entry(shape, 0), entry(shape, 1), entry(shape, 2), 0.0f, nullptr});
}

// inputs: x, scale, shift; outputs: out
void adaln_forward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& inputs,
                   const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const Tensors in(inputs), out(outputs);
  AdalnForward a{};
  a.x = call.tokens(in, 0, "x");
  a.scale = call.per_sample(in, 1, "scale");
  a.shift = call.per_sample(in, 2, "shift");
  a.out = call.tokens(out, 0, "out");
  call.run(adaln_tables[current]->plain[call.dtype], a);
}

// grads: of out; inputs: x, scale; outputs: the gradients of x, scale, shift, and a workspace
void adaln_backward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& grads,
                    const py::tuple& inputs, const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const Tensors given(grads, "gradient of "), in(inputs), out(outputs, "gradient of ");
  AdalnBackward a{};
  a.grad_out = call.tokens(given, 0, "out");
  a.x = call.tokens(in, 0, "x");
  a.scale = call.per_sample(in, 1, "scale");
  a.dx = call.tokens(out, 0, "x");
  a.dscale = call.per_sample(out, 1, "scale");
  a.dshift = call.per_sample(out, 2, "shift");
  call.run(adaln_tables[current]->plain[call.dtype], a, call.workspace(Tensors(outputs), 3));
}

// inputs: x, branch, gate, scale, shift; outputs: the new x, out
void gated_adaln_forward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& inputs,
                         const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const Tensors in(inputs), out(outputs);
  AdalnForward a{};
  a.x = call.tokens(in, 0, "x");
  a.branch = call.tokens(in, 1, "branch");
  a.gate = call.per_sample(in, 2, "gate");
  a.scale = call.per_sample(in, 3, "scale");
  a.shift = call.per_sample(in, 4, "shift");
  a.x_new = call.tokens(out, 0, "the new x");
  a.out = call.tokens(out, 1, "out");
  call.run(adaln_tables[current]->gated[call.dtype], a);
}

// grads: of the new x and of out; inputs: the new x, branch, gate, scale;
// outputs: the gradients of x, branch, gate, scale, shift, and a workspace
void gated_adaln_backward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& grads,
                          const py::tuple& inputs, const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const Tensors given(grads, "gradient of "), in(inputs), out(outputs, "gradient of ");
  AdalnBackward a{};
  a.grad_x_new = call.tokens(given, 0, "the new x");
  a.grad_out = call.tokens(given, 1, "out");
  a.x = call.tokens(in, 0, "the new x");
  a.branch = call.tokens(in, 1, "branch");
  a.gate = call.per_sample(in, 2, "gate");
  a.scale = call.per_sample(in, 3, "scale");
  a.dx = call.tokens(out, 0, "x");
  a.dbranch = call.tokens(out, 1, "branch");
  a.dgate = call.per_sample(out, 2, "gate");
  a.dscale = call.per_sample(out, 3, "scale");
  a.dshift = call.per_sample(out, 4, "shift");
  call.run(adaln_tables[current]->gated[call.dtype], a, call.workspace(Tensors(outputs), 5));
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
