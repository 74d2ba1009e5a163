#include "common/binding.h"

#include <memory>
#include <vector>

#include "mamba2/groups.h"
#include "mamba2/plan.h"

namespace mvar {
namespace {

using namespace mamba2;

const Kernels* const tables[] = MVAR_TABLES(mamba2_kernels);

// sizes: B, L, H, P, N, directions, taps, groups, dimensions of D
Sizes sizes_of(const py::tuple& sizes, const DtypeAndStream& at) {
  Sizes n{};
  int64_t* const all[] = {&n.B, &n.L, &n.H, &n.P, &n.N, &n.directions, &n.taps, &n.groups};
  for (size_t i = 0; i < 8; ++i) *all[i] = entry(sizes, i);
  if (n.groups < 1 || n.H % n.groups) throw py::value_error("groups: expected a divisor of the heads");
  n.channel_D = entry(sizes, 8) == 2;
  n.stream = at.stream;
  n.all_heads = n.H;
  return n;
}

// options: eps, the limits of Δ, Norm
Sizes sizes_of(const py::tuple& sizes, const DtypeAndStream& at, const py::tuple& options) {
  Sizes n = sizes_of(sizes, at);
  n.eps = real(options, 0);
  n.dt_min = real(options, 1);
  n.dt_max = real(options, 2);
  n.limits_dt = n.dt_min > 0 || n.dt_max <= __FLT_MAX__;
  n.norm = Norm(entry(options, 3));
  return n;
}

// (H), or (H, P)
float* skip(const Tensors& t, size_t i, const Sizes& n) {
  return n.channel_D ? t.dense<float>(i, "D", {n.H, n.P}) : t.dense<float>(i, "D", {n.H});
}

template <typename Arguments>
using Kernel = void (*)(const Arguments&, const Sizes&, const Plan&, float* workspace);
using WorkspaceFloats = int64_t (*)(const Sizes&, const Plan&);

// Group by group, with the workspace that is the last of `outputs`, if there is one, else with one of its own.
// all: with the heads of all groups
template <typename Arguments>
void run(Kernel<Arguments> kernel, WorkspaceFloats workspace_floats, const Arguments& a, const Sizes& all,
         const py::tuple& scales, int64_t itemsize, const Tensors* outputs = nullptr) {
  const Sizes n = of_group(all);
  const Cut pieces(scale_lengths(scales, n.L), n.directions == 2);
  const Plan plan = pieces.plan();
  const int64_t floats = present(workspace_floats)(n, plan);
  std::unique_ptr<float[]> own;
  float* workspace;
  if (outputs != nullptr) {
    workspace = outputs->dense<float>(3, "workspace", {floats});
  } else {
    own.reset(new float[floats]);
    workspace = own.get();
  }
  present(kernel);
  py::gil_scoped_release release;
  for (int64_t g = 0; g < n.groups; ++g) kernel(of_group(a, n, g, itemsize), of_group(n, g), plan, workspace);
}

States states(const Tensors& t, size_t i, const char* name, const Sizes& n) {
  const Heads v = t.heads(i, name, {n.B, n.H, n.P, n.N}, sizeof(float));
  return {(float*)v.data, v.batch_stride, v.row_stride, v.head_stride};
}

// The mixer's inputs: [z, x, B, C], dt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv state, ssm state; or,
// in this order, their gradients.
struct MixerTensors {
  Tokens z, xbc, conv_state;
  StepTokens dt;
  States initial;
  float *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight;

  // itemsize: of [z, x, B, C] and the conv state; all else is float32, but for dt where it says so
  MixerTensors(const Tensors& t, const Sizes& n, int64_t itemsize, int64_t dt_itemsize = sizeof(float)) {
    const int64_t E = n.H * n.P, channels = E + 2 * n.groups * n.N;
    const Tokens all = t.tokens(0, "zxbcdt", {n.B, n.L, E + channels}, itemsize);
    z = all;
    xbc = {(char*)all.data + E * itemsize, all.batch_stride, all.row_stride};
    const Tokens steps = t.tokens(1, "dt", {n.B, n.L, n.directions * n.H}, dt_itemsize);
    dt = {steps.data, steps.batch_stride, steps.row_stride, n.H, dt_itemsize == sizeof(float)};
    conv_weight = t.dense<float>(2, "conv_weight", {channels, n.taps});
    conv_bias = t.dense<float>(3, "conv_bias", {channels});
    dt_bias = per_direction(t, 4, "dt_bias", n);
    A_log = per_direction(t, 5, "A_log", n);
    D = skip(t, 6, n);
    norm_weight = t.dense<float>(7, "norm_weight", {E});
    conv_state = t.tokens(8, "conv state", {n.B, n.taps - 1, channels}, itemsize);
    initial = states(t, 9, "ssm state", n);
  }

  // (H), or (2, H)
  static float* per_direction(const Tensors& t, size_t i, const char* name, const Sizes& n) {
    return n.directions == 1 ? t.dense<float>(i, name, {n.H}) : t.dense<float>(i, name, {n.directions, n.H});
  }
};

MixerForward mixer_inputs(const Tensors& inputs, const Sizes& n, int64_t itemsize, int64_t dt_itemsize) {
  const MixerTensors t(inputs, n, itemsize, dt_itemsize);
  MixerForward a{};
  a.z = t.z;
  a.xbc = t.xbc;
  a.dt = t.dt;
  a.conv_state = t.conv_state;
  a.initial = t.initial;
  a.conv_weight = t.conv_weight;
  a.conv_bias = t.conv_bias;
  a.dt_bias = t.dt_bias;
  a.A_log = t.A_log;
  a.D = t.D;
  a.norm_weight = t.norm_weight;
  return a;
}

// y, and the two new states
void set_outputs(MixerForward& a, const Tensors& t, const Sizes& n, int64_t itemsize) {
  const int64_t E = n.H * n.P;
  a.y = t.tokens(0, "y", {n.B, n.L, E}, itemsize);
  a.last_conv = t.tokens(1, "new conv state", {n.B, n.taps - 1, E + 2 * n.groups * n.N}, itemsize);
  a.last = states(t, 2, "new ssm state", n);
}

// The scan's inputs: x, dt, A, B, C, D, initial state; or, in this order, their gradients.
struct ScanTensors {
  Heads x;
  StepTokens dt;
  float* A;
  Tokens B, C;
  float* D;
  States initial;

  // itemsize: of x, B and C; all else is float32
  ScanTensors(const Tensors& t, const Sizes& n, int64_t itemsize) {
    x = t.heads(0, "x", {n.B, n.L, n.H, n.P}, itemsize);
    dt = step_tokens(t, n);
    A = MixerTensors::per_direction(t, 2, "A", n);
    B = t.tokens(3, "B", {n.B, n.L, n.groups * n.N}, itemsize);
    C = t.tokens(4, "C", {n.B, n.L, n.groups * n.N}, itemsize);
    D = skip(t, 5, n);
    initial = states(t, 6, "initial_state", n);
  }

  // (B, L, H) or (B, L, 2, H)
  static StepTokens step_tokens(const Tensors& t, const Sizes& n) {
    if (n.directions == 1) {
      const Tokens v = t.tokens(1, "dt", {n.B, n.L, n.H}, sizeof(float));
      return {v.data, v.batch_stride, v.row_stride, 0, true};
    }
    const Heads v = t.heads(1, "dt", {n.B, n.L, n.directions, n.H}, sizeof(float));
    return {v.data, v.batch_stride, v.row_stride, v.head_stride, true};
  }
};

ScanForward scan_inputs(const Tensors& inputs, const Sizes& n, int64_t itemsize) {
  const ScanTensors t(inputs, n, itemsize);
  ScanForward a{};
  a.x = t.x;
  a.dt = t.dt;
  a.A = t.A;
  a.B = t.B;
  a.C = t.C;
  a.D = t.D;
  a.initial = t.initial;
  return a;
}

// outputs: y, the last state
void ssd_scan_forward(const py::tuple& at, const py::tuple& sizes, const py::tuple& scales, const py::tuple& inputs,
                      const py::tuple& outputs) {
  const DtypeAndStream call(at);
  const Sizes n = sizes_of(sizes, call);
  const Tensors out(outputs);
  ScanForward a = scan_inputs(Tensors(inputs), n, call.itemsize());
  a.y = out.heads(0, "y", {n.B, n.L, n.H, n.P}, call.itemsize());
  a.last = states(out, 1, "last state", n);
  const Kernels& kernels = *tables[current];
  run(kernels.scan_forward[call.dtype], kernels.forward_workspace[call.dtype], a, n, scales, call.itemsize());
}

// All tensors are float32. grads: of y and the last state; outputs: the gradients of the inputs
void ssd_scan_backward(const py::tuple& at, const py::tuple& sizes, const py::tuple& scales, const py::tuple& grads,
                       const py::tuple& inputs, const py::tuple& outputs) {
  const Sizes n = sizes_of(sizes, DtypeAndStream(at));
  const Tensors given(grads, "gradient of ");
  const ScanTensors out(Tensors(outputs, "gradient of "), n, sizeof(float));
  ScanBackward a{};
  a.forward = scan_inputs(Tensors(inputs), n, sizeof(float));
  a.grad_y = given.heads(0, "y", {n.B, n.L, n.H, n.P}, sizeof(float));
  a.grad_last = states(given, 1, "last state", n);
  a.dx = out.x;
  a.ddt = out.dt;
  a.dA = out.A;
  a.dB = out.B;
  a.dC = out.C;
  a.dD = out.D;
  a.dinitial = out.initial;
  const Kernels& kernels = *tables[current];
  run(kernels.scan_backward, kernels.backward_workspace, a, n, scales, sizeof(float));
}

// Floats of mamba2_mixer_forward's workspace.
int64_t mamba2_mixer_workspace(const py::tuple& at, const py::tuple& sizes, const py::tuple& scales) {
  const DtypeAndStream call(at);
  const Sizes n = of_group(sizes_of(sizes, call));
  const Cut pieces(scale_lengths(scales, n.L), n.directions == 2);
  return present(tables[current]->forward_workspace[call.dtype])(n, pieces.plan());
}

// dt_dtype: the index of dt's dtype, on a CPU float32; outputs: y, the two new states and, on a GPU, a workspace
void mamba2_mixer_forward(const py::tuple& at, const py::tuple& sizes, const py::tuple& scales,
                          const py::tuple& options, int64_t dt_dtype, const py::tuple& inputs,
                          const py::tuple& outputs) {
  const DtypeAndStream call(at);
  const Sizes n = sizes_of(sizes, call, options);
  const Tensors out(outputs);
  MixerForward a = mixer_inputs(Tensors(inputs), n, call.itemsize(), kItemsizes[DtypeAndStream::checked(dt_dtype)]);
  set_outputs(a, out, n, call.itemsize());
  const Kernels& kernels = *tables[current];
  run(kernels.mixer_forward[call.dtype], kernels.forward_workspace[call.dtype], a, n, scales, call.itemsize(),
      outputs.size() > 3 ? &out : nullptr);
}

// All tensors are float32. grads: of y and the two new states; outputs: the gradients of the inputs
void mamba2_mixer_backward(const py::tuple& at, const py::tuple& sizes, const py::tuple& scales,
                           const py::tuple& options, const py::tuple& grads, const py::tuple& inputs,
                           const py::tuple& outputs) {
  const Sizes n = sizes_of(sizes, DtypeAndStream(at), options);
  MixerForward given{};
  set_outputs(given, Tensors(grads, "gradient of "), n, sizeof(float));
  const MixerTensors out(Tensors(outputs, "gradient of "), n, sizeof(float));
  MixerBackward a{};
  a.forward = mixer_inputs(Tensors(inputs), n, sizeof(float), sizeof(float));
  a.grad_y = given.y;
  a.grad_last_conv = given.last_conv;
  a.grad_last = given.last;
  a.dz = out.z;
  a.dxbc = out.xbc;
  a.ddt = out.dt;
  a.dconv_state = out.conv_state;
  a.dinitial = out.initial;
  a.dconv_weight = out.conv_weight;
  a.dconv_bias = out.conv_bias;
  a.ddt_bias = out.dt_bias;
  a.dA_log = out.A_log;
  a.dD = out.D;
  a.dnorm_weight = out.norm_weight;
  const Kernels& kernels = *tables[current];
  run(kernels.mixer_backward, kernels.backward_workspace, a, n, scales, sizeof(float));
}

}  // namespace

void bind_mamba2(py::module_& m) {
  m.def("ssd_scan_forward", &ssd_scan_forward);
  m.def("ssd_scan_backward", &ssd_scan_backward);
  m.def("mamba2_mixer_workspace", &mamba2_mixer_workspace);
  m.def("mamba2_mixer_forward", &mamba2_mixer_forward);
  m.def("mamba2_mixer_backward", &mamba2_mixer_backward);
}

}  // namespace mvar
