#include "common/binding.h"

#include <memory>
#include <vector>

#include "mamba2/mamba2.h"
#if defined(MVAR_CUDA_MODULE)
#include "mamba2/cuda.h"
#else
#include "mamba2/plan.h"
#endif

namespace mvar {
namespace {

using namespace mamba2;

States states(Pointer data, const Sizes& n) {
  return {(float*)data, n.H * n.P * n.N, n.P * n.N, n.N};
}

// sizes: B, L, H, P, N, directions, taps
Sizes sizes_of(const py::tuple& sizes, float eps) {
  return {entry(sizes, 0), entry(sizes, 1), entry(sizes, 2), entry(sizes, 3),
          entry(sizes, 4), entry(sizes, 5), entry(sizes, 6), eps};
}

// Of a tuple of pairs (data_ptr, strides).
struct Tensors {
  const py::tuple& pairs;
  py::tuple pair(size_t i) const { return py::reinterpret_borrow<py::tuple>(pairs[i]); }
  Pointer data(size_t i) const { return Pointer(entry(pair(i), 0)); }
  float* floats(size_t i) const { return (float*)data(i); }
  py::tuple strides(size_t i) const { return py::reinterpret_borrow<py::tuple>(pair(i)[1]); }
  Tokens tokens(size_t i) const { return {(void*)data(i), entry(strides(i), 0), entry(strides(i), 1)}; }
  HeadTokens head_tokens(size_t i) const {
    const py::tuple s = strides(i);
    return {(void*)data(i), entry(s, 0), entry(s, 1), entry(s, 2)};
  }
  // (B, L, H) or (B, L, 2, H)
  StepTokens step_tokens(size_t i) const {
    const py::tuple s = strides(i);
    return {(void*)data(i), entry(s, 0), entry(s, 1), s.size() == 4 ? entry(s, 2) : 0};
  }
  States states(size_t i) const {
    const py::tuple s = strides(i);
    return {floats(i), entry(s, 0), entry(s, 1), entry(s, 2)};
  }
};

// zxbcdt, conv state, initial state, conv_weight, conv_bias, dt_bias, A, D, norm_weight
MixerForward mixer_inputs(const Tensors& t, const Sizes& n, int64_t bytes) {
  const int64_t E = n.H * n.P, xbc = E + 2 * n.N;
  const Tokens whole = t.tokens(0);
  MixerForward a{};
  a.z = whole;
  a.xbc = {(char*)whole.data + E * bytes, whole.batch_stride, whole.row_stride};
  a.dt = {(char*)whole.data + (E + xbc) * bytes, whole.batch_stride, whole.row_stride, n.H};
  a.conv_state = t.tokens(1);
  a.initial = t.states(2);
  a.conv_weight = t.floats(3);
  a.conv_bias = t.floats(4);
  a.dt_bias = t.floats(5);
  a.A = t.floats(6);
  a.D = t.floats(7);
  a.norm_weight = t.floats(8);
  return a;
}

void set_outputs(MixerForward& a, const Sizes& n, Pointer y, Pointer last_conv, Pointer last) {
  a.y = contiguous((void*)y, n.L, n.H * n.P);
  a.last_conv = contiguous((void*)last_conv, n.taps - 1, n.H * n.P + 2 * n.N);
  a.last = states(last, n);
}

#if defined(MVAR_CUDA_MODULE)

const CudaMixer* const tables[] = MVAR_TABLES(mamba2_mixer);

int64_t mamba2_mixer_workspace(const py::tuple& where, const py::tuple& sizes) {
  return tables[current]->workspace_bytes[entry(where, 0)](sizes_of(sizes, 0));
}

// where: the dtype's index and the stream; of the parameters, A_log takes the place of A
void mamba2_mixer_forward(const py::tuple& where, const py::tuple& sizes, float eps, const py::tuple& inputs,
                          Pointer workspace, Pointer y, Pointer last_conv, Pointer last) {
  const Sizes n = sizes_of(sizes, eps);
  MixerForward a = mixer_inputs({inputs}, n, sizeof(uint16_t));
  set_outputs(a, n, y, last_conv, last);
  const auto forward = tables[current]->forward[entry(where, 0)];
  void* stream = (void*)entry(where, 1);
  py::gil_scoped_release release;
  forward(a, n, (void*)workspace, stream);
}

}  // namespace

void bind_mamba2(py::module_& m) {
  m.def("mamba2_mixer_workspace", &mamba2_mixer_workspace);
  m.def("mamba2_mixer_forward", &mamba2_mixer_forward);
}

#else

const Kernels* const tables[] = MVAR_TABLES(mamba2_kernels);

typedef std::unique_ptr<float[]> Workspace;

Cut cut(const py::tuple& scales, const Sizes& n) {
  std::vector<int64_t> lengths(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) lengths[i] = entry(scales, i);
  return Cut(lengths, n.directions == 2);
}

// x, dt, A, B, C, D, initial state
ScanForward scan_inputs(const Tensors& t) {
  ScanForward a{};
  a.x = t.head_tokens(0);
  a.dt = t.step_tokens(1);
  a.A = t.floats(2);
  a.B = t.tokens(3);
  a.C = t.tokens(4);
  a.D = t.floats(5);
  a.initial = t.states(6);
  return a;
}

void ssd_scan_forward(bool bf16, const py::tuple& sizes, const py::tuple& scales, const py::tuple& inputs, Pointer y,
                      Pointer last) {
  const Sizes n = sizes_of(sizes, 0);
  ScanForward a = scan_inputs({inputs});
  a.y = {(void*)y, n.L * n.H * n.P, n.H * n.P, n.P};
  a.last = states(last, n);
  const Cut pieces = cut(scales, n);
  const Plan plan = pieces.plan();
  const Kernels& kernels = *tables[current];
  const Workspace workspace(new float[kernels.forward_workspace(n, plan)]);
  py::gil_scoped_release release;
  (bf16 ? kernels.scan_bf16 : kernels.scan_f32)(a, n, plan, workspace.get());
}

// grads: of y and the last state; outputs: the gradients of the inputs, in their order
void ssd_scan_backward(const py::tuple& sizes, const py::tuple& scales, const py::tuple& grads,
                       const py::tuple& inputs, const py::tuple& outputs) {
  const Sizes n = sizes_of(sizes, 0);
  const Tensors given{grads}, out{outputs};
  const ScanBackward a{scan_inputs({inputs}), given.head_tokens(0), given.states(1), out.head_tokens(0),
                       out.step_tokens(1),    out.tokens(3),        out.tokens(4),   out.floats(2),
                       out.floats(5),         out.states(6)};
  const Cut pieces = cut(scales, n);
  const Plan plan = pieces.plan();
  const Kernels& kernels = *tables[current];
  const Workspace workspace(new float[kernels.backward_workspace(n, plan)]);
  py::gil_scoped_release release;
  kernels.scan_backward(a, n, plan, workspace.get());
}

void mamba2_mixer_forward(bool bf16, const py::tuple& sizes, const py::tuple& scales, float eps,
                          const py::tuple& inputs, Pointer y, Pointer last_conv, Pointer last) {
  const Sizes n = sizes_of(sizes, eps);
  MixerForward a = mixer_inputs({inputs}, n, bf16 ? 2 : 4);
  set_outputs(a, n, y, last_conv, last);
  const Cut pieces = cut(scales, n);
  const Plan plan = pieces.plan();
  const Kernels& kernels = *tables[current];
  const Workspace workspace(new float[kernels.forward_workspace(n, plan)]);
  py::gil_scoped_release release;
  (bf16 ? kernels.mixer_bf16 : kernels.mixer_f32)(a, n, plan, workspace.get());
}

// grads: of y and the two new states; outputs: the gradients of the inputs, in their order
void mamba2_mixer_backward(const py::tuple& sizes, const py::tuple& scales, float eps, const py::tuple& grads,
                           const py::tuple& inputs, const py::tuple& outputs) {
  const Sizes n = sizes_of(sizes, eps);
  const Tensors given{grads}, out{outputs};
  MixerBackward a{};
  a.forward = mixer_inputs({inputs}, n, sizeof(float));
  a.grad_y = given.tokens(0);
  a.grad_last_conv = given.tokens(1);
  a.grad_last = given.states(2);
  const MixerForward places = mixer_inputs(out, n, sizeof(float));
  a.dz = places.z;
  a.dxbc = places.xbc;
  a.ddt = places.dt;
  a.dconv_state = places.conv_state;
  a.dinitial = places.initial;
  a.dconv_weight = out.floats(3);
  a.dconv_bias = out.floats(4);
  a.ddt_bias = out.floats(5);
  a.dA_log = out.floats(6);
  a.dD = out.floats(7);
  a.dnorm_weight = out.floats(8);
  const Cut pieces = cut(scales, n);
  const Plan plan = pieces.plan();
  const Kernels& kernels = *tables[current];
  const Workspace workspace(new float[kernels.backward_workspace(n, plan)]);
  py::gil_scoped_release release;
  kernels.mixer_backward(a, n, plan, workspace.get());
}

}  // namespace

void bind_mamba2(py::module_& m) {
  m.def("ssd_scan_forward", &ssd_scan_forward);
  m.def("ssd_scan_backward", &ssd_scan_backward);
  m.def("mamba2_mixer_forward", &mamba2_mixer_forward);
  m.def("mamba2_mixer_backward", &mamba2_mixer_backward);
}

#endif

}  // namespace mvar
