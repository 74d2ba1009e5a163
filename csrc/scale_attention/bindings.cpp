#include "common/binding.h"

#include <memory>
#include <vector>

#include "scale_attention/scale_attention.h"

namespace mvar {
namespace {

Heads heads(Pointer data, const py::tuple& strides) {
  return {(void*)data, entry(strides, 0), entry(strides, 1), entry(strides, 2)};
}
Heads heads(Pointer data, int64_t L, const ScaleAttentionSizes& n) {
  return {(void*)data, L * n.H * n.D, n.H * n.D, n.D};
}

const ScaleAttentionKernels* const tables[] = MVAR_TABLES(scale_attention);

#if defined(MVAR_CUDA_MODULE)

// where: the dtype's index and the stream; shape: (B, Lq, H, D)
void forward(const py::tuple& where, const py::tuple& shape, float scale, Pointer q, const py::tuple& q_strides,
             Pointer k, const py::tuple& k_strides, Pointer v, const py::tuple& v_strides, Pointer log_temperature,
             Pointer tiles, int64_t tile_count, Pointer spans, Pointer out, Pointer lse) {
  ScaleAttentionSizes n{};
  n.B = entry(shape, 0);
  n.Lq = entry(shape, 1);
  n.H = entry(shape, 2);
  n.D = entry(shape, 3);
  n.scale = scale;
  n.log_temperature = (const float*)log_temperature;
  n.tiles = (const int32_t*)tiles;
  n.spans = (const int32_t*)spans;
  n.tile_count = tile_count;
  n.stream = (void*)entry(where, 1);
  ScaleAttentionForward a{};
  a.q = heads(q, q_strides);
  a.k = heads(k, k_strides);
  a.v = heads(v, v_strides);
  a.out = heads(out, n.Lq, n);
  a.lse = (float*)lse;
  const auto kernel = tables[current]->forward[entry(where, 0)];
  py::gil_scoped_release release;
  kernel(a, n);
}

#else

// (B, Lq, L, H, D), and the scales as C++ numbers, which the sizes point into
ScaleAttentionSizes sizes(const py::tuple& shape, const py::tuple& scales, std::vector<int64_t>& lengths, bool causal,
                          float scale, Pointer log_temperature) {
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
  n.log_temperature = (const float*)log_temperature;
  return n;
}

const ScaleAttentionPair& kernels(bool bf16) { return bf16 ? tables[current]->bf16 : tables[current]->f32; }

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

void forward(bool bf16, const py::tuple& shape, const py::tuple& scales, bool causal, float scale, Pointer q,
             const py::tuple& q_strides, Pointer k, const py::tuple& k_strides, Pointer v,
             const py::tuple& v_strides, Pointer log_temperature, Pointer out, Pointer lse) {
  std::vector<int64_t> lengths;
  const ScaleAttentionSizes n = sizes(shape, scales, lengths, causal, scale, log_temperature);
  ScaleAttentionForward a{};
  a.q = heads(q, q_strides);
  a.k = heads(k, k_strides);
  a.v = heads(v, v_strides);
  a.out = heads(out, n.Lq, n);
  a.lse = (float*)lse;
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> workspace = floats(kernels(bf16).forward_workspace(n));
  kernels(bf16).forward(a, n, workspace.get());
}

void backward(bool bf16, const py::tuple& shape, const py::tuple& scales, bool causal, float scale, Pointer grad_out,
              const py::tuple& grad_out_strides, Pointer q, const py::tuple& q_strides, Pointer k,
              const py::tuple& k_strides, Pointer v, const py::tuple& v_strides, Pointer log_temperature, Pointer dq,
              Pointer dk, Pointer dv, Pointer dlog_temperature) {
  std::vector<int64_t> lengths;
  const ScaleAttentionSizes n = sizes(shape, scales, lengths, causal, scale, log_temperature);
  ScaleAttentionBackward a{};
  a.grad_out = heads(grad_out, grad_out_strides);
  a.q = heads(q, q_strides);
  a.k = heads(k, k_strides);
  a.v = heads(v, v_strides);
  a.dq = heads(dq, n.Lq, n);
  a.dk = heads(dk, n.L, n);
  a.dv = heads(dv, n.L, n);
  a.dlog_temperature = (float*)dlog_temperature;
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
