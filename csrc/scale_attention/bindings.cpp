#include "common/binding.h"

#include <memory>
#include <vector>

#include "scale_attention/scale_attention.h"

namespace mvar {
namespace {

const ScaleAttentionKernels* const tables[] = MVAR_TABLES(scale_attention);

// (H), or null where q and k are not normalised
const float* log_temperature(const Tensors& inputs, const ScaleAttentionSizes& n) {
  return inputs.has(3) ? inputs.dense<const float>(3, "log_temperature", {n.H}) : nullptr;
}

// inputs: q, k, v; outputs: out, lse; L: tokens of k and v
ScaleAttentionForward arguments(const Tensors& in, const Tensors& out, const ScaleAttentionSizes& n, int64_t L,
                                int64_t itemsize) {
  return {in.heads(0, "q", {n.B, n.Lq, n.H, n.D}, itemsize), in.heads(1, "k", {n.B, L, n.H, n.D}, itemsize),
          in.heads(2, "v", {n.B, L, n.H, n.D}, itemsize), out.heads(0, "out", {n.B, n.Lq, n.H, n.D}, itemsize),
          out.dense<float>(1, "lse", {n.B, n.H, n.Lq})};
}

#if defined(MVAR_CUDA_MODULE)

// where: the dtype's index and the stream; shape: (B, Lq, L, H, D); inputs: q, k, v, log_temperature or None, tiles,
// spans; outputs: out, lse
void forward(const py::tuple& where, const py::tuple& shape, float scale, const py::tuple& inputs, int64_t tile_count,
             const py::tuple& outputs) {
  const Where at(where);
  const Tensors in(inputs), out(outputs);
  ScaleAttentionSizes n{};
  n.B = entry(shape, 0);
  n.Lq = entry(shape, 1);
  n.H = entry(shape, 3);
  n.D = entry(shape, 4);
  n.scale = scale;
  n.log_temperature = log_temperature(in, n);
  n.tiles = in.dense<const int32_t>(4, "tiles", {tile_count, 6});
  n.spans = in.dense<const int32_t>(5, "spans", {2, n.Lq});
  n.tile_count = tile_count;
  n.stream = at.stream;
  const ScaleAttentionForward a = arguments(in, out, n, entry(shape, 2), kItemsizes[at.dtype]);
  const auto kernel = present(tables[current]->forward[at.dtype]);
  py::gil_scoped_release release;
  kernel(a, n);
}

#else

// (B, Lq, L, H, D), and the scales as C++ numbers, which the sizes point into
ScaleAttentionSizes sizes(const py::tuple& shape, const py::tuple& scales, std::vector<int64_t>& lengths, bool causal,
                          float scale, const Tensors& inputs) {
  lengths = scale_lengths(scales, entry(shape, 2));
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
  n.log_temperature = log_temperature(inputs, n);
  return n;
}

int64_t itemsize(bool bf16) { return kItemsizes[bf16 ? kBfloat16 : kFloat32]; }

const ScaleAttentionPair& kernels(bool bf16) { return bf16 ? tables[current]->bf16 : tables[current]->f32; }

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

// inputs: q, k, v, log_temperature or None; outputs: out, lse
void forward(bool bf16, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
             const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors in(inputs), out(outputs);
  std::vector<int64_t> lengths;
  const ScaleAttentionSizes n = sizes(shape, scales, lengths, causal, scale, in);
  const ScaleAttentionForward a = arguments(in, out, n, n.L, itemsize(bf16));
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> workspace = floats(kernels(bf16).forward_workspace(n));
  kernels(bf16).forward(a, n, workspace.get());
}

// grads: of out; inputs: q, k, v, log_temperature or None; outputs: their gradients
void backward(bool bf16, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
              const py::tuple& grads, const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors given(grads, "gradient of "), in(inputs), out(outputs, "gradient of ");
  std::vector<int64_t> lengths;
  const ScaleAttentionSizes n = sizes(shape, scales, lengths, causal, scale, in);
  const auto queries = [&](const Tensors& t, size_t i, const char* name) {
    return t.heads(i, name, {n.B, n.Lq, n.H, n.D}, itemsize(bf16));
  };
  const auto keys = [&](const Tensors& t, size_t i, const char* name) {
    return t.heads(i, name, {n.B, n.L, n.H, n.D}, itemsize(bf16));
  };
  ScaleAttentionBackward a{};
  a.grad_out = queries(given, 0, "out");
  a.q = queries(in, 0, "q");
  a.k = keys(in, 1, "k");
  a.v = keys(in, 2, "v");
  a.dq = queries(out, 0, "q");
  a.dk = keys(out, 1, "k");
  a.dv = keys(out, 2, "v");
  if (n.log_temperature != nullptr) a.dlog_temperature = out.dense<float>(3, "log_temperature", {n.H});
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
