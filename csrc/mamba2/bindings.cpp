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

// sizes: B, L, H, P, N, directions, taps
Sizes sizes_of(const py::tuple& sizes, float eps) {
  return {entry(sizes, 0), entry(sizes, 1), entry(sizes, 2), entry(sizes, 3),
          entry(sizes, 4), entry(sizes, 5), entry(sizes, 6), eps};
}

// (B, L, H) or (B, L, 2, H)
StepTokens step_tokens(const Tensors& t, size_t i) {
  const py::tuple s = t.strides(i);
  return {t.data<void>(i), entry(s, 0), entry(s, 1), s.size() == 4 ? entry(s, 2) : 0};
}

States states(const Tensors& t, size_t i) {
  const py::tuple s = t.strides(i);
  return {t.floats(i), entry(s, 0), entry(s, 1), entry(s, 2)};
}

// zxbcdt, conv state, initial state, conv_weight, conv_bias, dt_bias, A, D, norm_weight
MixerForward mixer_inputs(const Tensors& t, const Sizes& n, int64_t bytes) {
  const int64_t E = n.H * n.P, xbc = E + 2 * n.N;
  const Tokens whole = t.tokens(0);
  MixerForward a{};
  a.z = whole;
  a.xbc = {(char*)whole.data + E * bytes, whole.batch_stride, whole.row_stride};
  a.dt = {(char*)whole.data + (E + xbc) * bytes, whole.batch_stride, whole.row_stride, n.H};
  a.conv_state = t.tokens(1);
  a.initial = states(t, 2);
  a.conv_weight = t.floats(3);
  a.conv_bias = t.floats(4);
  a.dt_bias = t.floats(5);
  a.A = t.floats(6);
  a.D = t.floats(7);
  a.norm_weight = t.floats(8);
  return a;
}

// y, and the two new states
void set_outputs(MixerForward& a, const Tensors& t) {
  a.y = t.tokens(0);
  a.last_conv = t.tokens(1);
  a.last = states(t, 2);
}

#if defined(MVAR_CUDA_MODULE)

const CudaMixer* const tables[] = MVAR_TABLES(mamba2_mixer);

int64_t mamba2_mixer_workspace(const py::tuple& where, const py::tuple& sizes) {
  return tables[current]->workspace_bytes[entry(where, 0)](sizes_of(sizes, 0));
}

// where: the dtype's index and the stream; of the parameters, A_log takes the place of A
void mamba2_mixer_forward(const py::tuple& where, const py::tuple& sizes, float eps, const py::tuple& inputs,
                          const py::tuple& outputs, Pointer workspace) {
  const Sizes n = sizes_of(sizes, eps);
  MixerForward a = mixer_inputs(Tensors(inputs), n, sizeof(uint16_t));
  set_outputs(a, Tensors(outputs));
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

Cut cut(const py::tuple& scales, const Sizes& n) {
  std::vector<int64_t> lengths(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) lengths[i] = entry(scales, i);
  return Cut(lengths, n.directions == 2);
}

template <typename Arguments>
void run(void (*kernel)(const Arguments&, const Sizes&, const Plan&, float*),
         int64_t (*workspace_floats)(const Sizes&, const Plan&), const Arguments& a, const Sizes& n,
         const py::tuple& scales) {
  const Cut pieces = cut(scales, n);
  const Plan plan = pieces.plan();
  const std::unique_ptr<float[]> workspace(new float[workspace_floats(n, plan)]);
  py::gil_scoped_release release;
  kernel(a, n, plan, workspace.get());
}

// x, dt, A, B, C, D, initial state
ScanForward scan_inputs(const Tensors& t) {
  ScanForward a{};
  a.x = t.heads(0);
  a.dt = step_tokens(t, 1);
  a.A = t.floats(2);
  a.B = t.tokens(3);
  a.C = t.tokens(4);
  a.D = t.floats(5);
  a.initial = states(t, 6);
  return a;
}

// outputs: y, the last state
void ssd_scan_forward(bool bf16, const py::tuple& sizes, const py::tuple& scales, const py::tuple& inputs,
                      const py::tuple& outputs) {
  const Tensors out(outputs);
  ScanForward a = scan_inputs(Tensors(inputs));
  a.y = out.heads(0);
  a.last = states(out, 1);
  const Kernels& kernels = *tables[current];
  run(bf16 ? kernels.scan_bf16 : kernels.scan_f32, kernels.forward_workspace, a, sizes_of(sizes, 0), scales);
}

// grads: of y and the last state; outputs: the gradients of the inputs, in their order
void ssd_scan_backward(const py::tuple& sizes, const py::tuple& scales, const py::tuple& grads,
                       const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors given(grads), out(outputs);
  ScanBackward a{};
  a.forward = scan_inputs(Tensors(inputs));
  a.grad_y = given.heads(0);
  a.grad_last = states(given, 1);
  a.dx = out.heads(0);
  a.ddt = step_tokens(out, 1);
  a.dA = out.floats(2);
  a.dB = out.tokens(3);
  a.dC = out.tokens(4);
  a.dD = out.floats(5);
  a.dinitial = states(out, 6);
  const Kernels& kernels = *tables[current];
  run(kernels.scan_backward, kernels.backward_workspace, a, sizes_of(sizes, 0), scales);
}

void mamba2_mixer_forward(bool bf16, const py::tuple& sizes, const py::tuple& scales, float eps,
                          const py::tuple& inputs, const py::tuple& outputs) {
  const Sizes n = sizes_of(sizes, eps);
  MixerForward a = mixer_inputs(Tensors(inputs), n, bf16 ? 2 : 4);
  set_outputs(a, Tensors(outputs));
  const Kernels& kernels = *tables[current];
  run(bf16 ? kernels.mixer_bf16 : kernels.mixer_f32, kernels.forward_workspace, a, n, scales);
}

// grads: of y and the two new states; outputs: the gradients of the inputs, in their order
void mamba2_mixer_backward(const py::tuple& sizes, const py::tuple& scales, float eps, const py::tuple& grads,
                           const py::tuple& inputs, const py::tuple& outputs) {
  const Sizes n = sizes_of(sizes, eps);
  const Tensors given(grads), out(outputs);
  MixerBackward a{};
  a.forward = mixer_inputs(Tensors(inputs), n, sizeof(float));
  a.grad_y = given.tokens(0);
  a.grad_last_conv = given.tokens(1);
  a.grad_last = states(given, 2);
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
  const Kernels& kernels = *tables[current];
  run(kernels.mixer_backward, kernels.backward_workspace, a, n, scales);
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
