#include "common/binding.h"

#include <memory>
#include <vector>

#include "scale_attention/scale_attention.h"

namespace mvar {
namespace {

const ScaleAttentionKernels* const tables[] = MVAR_TABLES(scale_attention);

#if defined(MVAR_CUDA_MODULE)

// where: the dtype's index and the stream; shape: (B, Lq, H, D); inputs: q, k, v, log_temperature, tiles, spans;
// outputs: out, lse
void forward(const py::tuple& where, const py::tuple& shape, float scale, const py::tuple& inputs, int64_t tile_count,
             const py::tuple& outputs) {
  const Tensors in(inputs), out(outputs);
  ScaleAttentionSizes n{};
  n.B = entry(shape, 0);
  n.Lq = entry(shape, 1);
  n.H = entry(shape, 2);
  n.D = entry(shape, 3);
  n.scale = scale;
  n.log_temperature = in.floats(3);
  n.tiles = in.data<const int32_t>(4);
  n.spans = in.data<const int32_t>(5);
  n.tile_count = tile_count;
  n.stream = (void*)entry(where, 1);
  const ScaleAttentionForward a{in.heads(0), in.heads(1), in.heads(2), out.heads(0), out.floats(1)};
  const auto kernel = tables[current]->forward[entry(where, 0)];
  py::gil_scoped_release release;
  kernel(a, n);
}

#else

// (B, Lq, L, H, D), and the scales as C++ numbers, which the sizes point into
ScaleAttentionSizes sizes(const py::tuple& shape, const py::tuple& scales, std::vector<int64_t>& lengths, bool causal,
                          float scale, const float* log_temperature) {
  for (size_t i = 0; i < scales.size(); ++i) lengths.push_back(entry(scales, i));
  ScaleAttentionSizes n{};
  n.B = entry(shape, 0);
  n.Lq = entry(shape, 1);
  n.L = entry(shape, 2);
  n.H = entry(shape, 3);
  n.D = entry(shape, 4);
  n.scales = lengths.data();
  n.scale_count = (int64_t)lengths.size();
  n.causal = causal;
  n.scale = scale;
  n.log_temperature = log_temperature;
  return n;
}

const ScaleAttentionPair& kernels(bool bf16) { return bf16 ? tables[current]->bf16 : tables[current]->f32; }

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

// inputs: q, k, v, log_temperature; outputs: out, lse
void forward(bool bf16, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
             const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors in(inputs), out(outputs);
  std::vector<int64_t> lengths;
  const ScaleAttentionSizes n = sizes(shape, scales, lengths, causal, scale, in.floats(3));
  const ScaleAttentionForward a{in.heads(0), in.heads(1), in.heads(2), out.heads(0), out.floats(1)};
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> workspace = floats(kernels(bf16).forward_workspace(n));
  kernels(bf16).forward(a, n, workspace.get());
}

// grads: of out; inputs: q, k, v, log_temperature; outputs: their gradients
void backward(bool bf16, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
              const py::tuple& grads, const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors given(grads), in(inputs), out(outputs);
  std::vector<int64_t> lengths;
  const ScaleAttentionSizes n = sizes(shape, scales, lengths, causal, scale, in.floats(3));
  const ScaleAttentionBackward a{given.heads(0), in.heads(0),  in.heads(1),  in.heads(2),
                                 out.heads(0),   out.heads(1), out.heads(2), out.floats(3)};
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> workspace = floats(kernels(bf16).backward_workspace(n));
  kernels(bf16).backward(a, n, workspace.get());
}

#endif

}  // namespace

void bind_scale_attention(py::module_& m) {
  m.def("scale_attention_forward", &forward);
#if !defined(MVAR_CUDA_MODULE)
  m.def("scale_attention_backward", &backward);
#endif
}

}  // namespace mvar
