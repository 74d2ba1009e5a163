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

  // As those of a call's dtype, or null where there is none.
  Tokens tokens(const Tensors& t, size_t i, const char* name, Dtype other) const {
    return t.has(i) ? t.tokens(i, name, {n.B, n.L, n.C}, kItemsizes[other]) : Tokens{};
  }
  PerSample per_sample(const Tensors& t, size_t i, const char* name, Dtype other) const {
    return t.has(i) ? t.per_sample(i, name, {n.B, n.C}, kItemsizes[other]) : PerSample{};
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

// Options as mvar_kernels/ops/adaln/native.py passes them: the dtypes of the output (and the branch), of what is per
// sample and of what is per token; whether the norm is RMS; and `plus`.
struct GivenOptions {
  Dtype out, vectors, tokens;
  AdalnOptions options;

  GivenOptions(const py::tuple& given, float plus)
      : out(DtypeAndStream::checked(entry(given, 0))),
        vectors(DtypeAndStream::checked(entry(given, 1))),
        tokens(DtypeAndStream::checked(entry(given, 2))),
        options{entry(given, 3) != 0, plus, vectors == kFloat32, tokens == kFloat32} {
    for (Dtype of : {vectors, tokens}) {
      if (of != kFloat32 && of != out) throw py::value_error("modulation: expected float32, or the output's dtype");
    }
  }

  const AdalnPair& kernels(const Call& call) const { return adaln_tables[current]->with_options[call.dtype][out]; }
};

// inputs: x, branch, gate, factor, offset, and per token gate, scale, shift; outputs: the new x, out. All but x and out
// may be none; the new x is written where there is a branch.
void adaln_options_forward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& options, float plus,
                           const py::tuple& inputs, const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const GivenOptions o(options, plus);
  const Tensors in(inputs), out(outputs);
  AdalnForward a{};
  a.options = o.options;
  a.x = call.tokens(in, 0, "x");
  const bool gated = in.has(1);
  if (gated) a.branch = call.tokens(in, 1, "branch", o.out);
  if (gated) a.x_new = call.tokens(out, 0, "the new x");
  a.gate = call.per_sample(in, 2, "gate", o.vectors);
  a.scale = call.per_sample(in, 3, "scale", o.vectors);
  a.shift = call.per_sample(in, 4, "shift", o.vectors);
  a.token_gate = call.tokens(in, 5, "gate", o.tokens);
  a.token_scale = call.tokens(in, 6, "scale", o.tokens);
  a.token_shift = call.tokens(in, 7, "shift", o.tokens);
  a.out = call.tokens(out, 1, "out", o.out);
  call.run(o.kernels(call), a);
}

// grads: of the new x and of out; inputs: as forward, x the new one, without the shift per token;
// outputs: the gradients of x, branch, gate, factor, offset, and per token gate, scale, shift, and a workspace
void adaln_options_backward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& options,
                            float plus, const py::tuple& grads, const py::tuple& inputs, const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const GivenOptions o(options, plus);
  const Tensors given(grads, "gradient of "), in(inputs), out(outputs, "gradient of ");
  AdalnBackward a{};
  a.options = o.options;
  const bool gated = in.has(1);
  if (gated) a.grad_x_new = call.tokens(given, 0, "the new x");
  a.grad_out = call.tokens(given, 1, "out", o.out);
  a.x = call.tokens(in, 0, "x");
  if (gated) a.branch = call.tokens(in, 1, "branch", o.out);
  a.gate = call.per_sample(in, 2, "gate", o.vectors);
  a.scale = call.per_sample(in, 3, "scale", o.vectors);
  a.shift = call.per_sample(in, 4, "shift", o.vectors);
  a.token_gate = call.tokens(in, 5, "gate", o.tokens);
  a.token_scale = call.tokens(in, 6, "scale", o.tokens);
  a.dx = call.tokens(out, 0, "x");
  if (gated) a.dbranch = call.tokens(out, 1, "branch", o.out);
  a.dgate = call.per_sample(out, 2, "gate", kFloat32);
  a.dscale = call.per_sample(out, 3, "scale", kFloat32);
  a.dshift = call.per_sample(out, 4, "shift", kFloat32);
  a.token_dgate = call.tokens(out, 5, "gate", o.tokens);
  a.token_dscale = call.tokens(out, 6, "scale", o.tokens);
  a.token_dshift = call.tokens(out, 7, "shift", o.tokens);
  call.run(o.kernels(call), a, call.workspace(Tensors(outputs), 8));
}

}  // namespace

void bind_adaln(py::module_& m) {
  m.def("adaln_forward", &adaln_forward);
  m.def("gated_adaln_forward", &gated_adaln_forward);
  m.def("adaln_backward", &adaln_backward);
  m.def("gated_adaln_backward", &gated_adaln_backward);
  m.def("adaln_options_forward", &adaln_options_forward);
  m.def("adaln_options_backward", &adaln_options_backward);
  m.def("adaln_backward_workspace", &backward_workspace);
}

}  // namespace mvar
