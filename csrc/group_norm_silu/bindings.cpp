#include "common/binding.h"

#include "group_norm_silu/group_norm_silu.h"

namespace mvar {
namespace {

const GroupNormKernels* const tables[] = MVAR_TABLES(group_norm_silu);

// shape: B, C, L, groups, and whether channels are last
struct Call {
  const GroupNormSizes n;
  const Dtype dtype;

  Call(const DtypeAndStream& at, const py::tuple& shape, float eps)
      : n{entry(shape, 0), entry(shape, 1), entry(shape, 2), entry(shape, 3), entry(shape, 4) != 0, eps},
        dtype(at.dtype) {
    if (n.groups < 1 || n.C < 1 || n.C % n.groups != 0) throw py::value_error("groups: expected a divisor of the channels");
  }

  Tokens maps(const Tensors& t, size_t i, const char* name) const {
    return n.channels_last ? t.tokens(i, name, {n.B, n.L, n.C}, kItemsizes[dtype])
                           : t.tokens(i, name, {n.B, n.C, n.L}, kItemsizes[dtype]);
  }
  float* workspace(const Tensors& t, size_t i) const {
    return t.dense<float>(i, "workspace", {tables[current]->workspace(n)});
  }
};

int64_t workspace(const py::tuple& shape) {
  return tables[current]->workspace(Call(DtypeAndStream(py::make_tuple(0, 0)), shape, 0.0f).n);
}

// inputs: x, weight, bias; outputs: out, and a workspace
void forward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& inputs, const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const Tensors in(inputs), out(outputs);
  const GroupNormForward a{call.maps(in, 0, "x"), in.dense<float>(1, "weight", {call.n.C}),
                           in.dense<float>(2, "bias", {call.n.C}), call.maps(out, 0, "out")};
  float* const floats = call.workspace(out, 1);
  const auto kernel = present(tables[current]->of[call.dtype].forward);
  py::gil_scoped_release release;
  kernel(a, call.n, floats);
}

// grads: of out; inputs: x, weight, bias; outputs: the gradients of x, weight and bias, the last two for each sample, and
// a workspace
void backward(const py::tuple& at, const py::tuple& shape, float eps, const py::tuple& grads, const py::tuple& inputs,
              const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, eps);
  const Tensors given(grads, "gradient of "), in(inputs), out(outputs, "gradient of ");
  const int64_t B = call.n.B, C = call.n.C;
  const GroupNormBackward a{call.maps(given, 0, "out"),
                            call.maps(in, 0, "x"),
                            in.dense<float>(1, "weight", {C}),
                            in.dense<float>(2, "bias", {C}),
                            call.maps(out, 0, "x"),
                            out.dense<float>(1, "weight", {B, C}),
                            out.dense<float>(2, "bias", {B, C})};
  float* const floats = call.workspace(Tensors(outputs), 3);
  const auto kernel = present(tables[current]->of[call.dtype].backward);
  py::gil_scoped_release release;
  kernel(a, call.n, floats);
}

}  // namespace

void bind_group_norm_silu(py::module_& m) {
  m.def("group_norm_silu_forward", &forward);
  m.def("group_norm_silu_backward", &backward);
  m.def("group_norm_silu_workspace", &workspace);
}

}  // namespace mvar
