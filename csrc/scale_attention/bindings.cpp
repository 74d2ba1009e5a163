#include "common/binding.h"

#include <memory>
#include <vector>

#include "scale_attention/scale_attention.h"

namespace mvar {
namespace {

const ScaleAttentionKernels* const tables[] = MVAR_TABLES(scale_attention);

// shape: (B, Lq, L, H, D), how many tiles the plan has (0 on a CPU), the angles in a row of rotary (or 0), and the
// heads of k and v; scales: tokens per scale;
// inputs: q, k, v, log_temperature or None, the plan's tiles and spans on a GPU, else None, of rotary the cosines and
// sines, or None, and key_lengths or None.
struct Call {
  const Dtype dtype;
  const std::vector<int64_t> scales;
  int64_t key_heads;
  ScaleAttentionSizes n;
  const ScaleAttentionPair& kernels;

  Call(const DtypeAndStream& at, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
       bool interleaved, const Tensors& in)
      : dtype(at.dtype),
        scales(scale_lengths(scales, entry(shape, 2))),
        key_heads(0),
        n{},
        kernels(tables[current]->of_dtype[dtype]) {
    n.B = entry(shape, 0);
    n.Lq = entry(shape, 1);
    n.L = entry(shape, 2);
    n.H = entry(shape, 3);
    n.D = entry(shape, 4);
    key_heads = entry(shape, 7);
    if (key_heads < 1 || n.H % key_heads) throw py::value_error("k: expected heads that divide those of q");
    n.group = n.H / key_heads;
    n.scales = this->scales.data();
    n.scale_count = (int64_t)this->scales.size();
    n.causal = causal;
    n.scale = scale;
    n.stream = at.stream;
    if (in.has(3)) n.log_temperature = in.dense<const float>(3, "log_temperature", {n.H});
    if (in.has(6)) {
      n.angles = entry(shape, 6);
      if (n.D % 2 || (n.angles != n.D && n.angles != n.D / 2)) throw py::value_error("rotary: expected D/2 or D angles");
      n.cos = in.dense<const float>(6, "cos", {n.L, n.angles});
      n.sin = in.dense<const float>(7, "sin", {n.L, n.angles});
      n.interleaved = interleaved;
    }
    if (in.has(8)) n.key_lengths = in.dense<const int64_t>(8, "key_lengths", {n.B});
    if (!in.has(4)) return;
    n.tile_count = entry(shape, 5);
    n.tiles = in.dense<const int32_t>(4, "tiles", {n.tile_count, 6});
    n.spans = in.dense<const int32_t>(5, "spans", {2, n.Lq});
  }
  Call(const Call&) = delete;  // n points into scales

  Heads queries(const Tensors& t, size_t i, const char* name) const {
    return t.heads(i, name, {n.B, n.Lq, n.H, n.D}, kItemsizes[dtype]);
  }
  Heads keys(const Tensors& t, size_t i, const char* name) const {
    return t.heads(i, name, {n.B, n.L, key_heads, n.D}, kItemsizes[dtype]);
  }
};

// outputs: out, lse
void forward(const py::tuple& at, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
             bool interleaved, const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors in(inputs), out(outputs);
  const Call call(DtypeAndStream(at), shape, scales, causal, scale, interleaved, in);
  const ScaleAttentionSizes& n = call.n;
  ScaleAttentionForward a{};
  a.q = call.queries(in, 0, "q");
  a.k = call.keys(in, 1, "k");
  a.v = call.keys(in, 2, "v");
  a.out = call.queries(out, 0, "out");
  a.lse = out.dense<float>(1, "lse", {n.B, n.H, n.Lq});
  const auto kernel = present(call.kernels.forward);
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> workspace(new float[call.kernels.forward_workspace(n)]);
  kernel(a, n, workspace.get());
}

// grads: of out; outputs: the gradients of q, k, v and, where given, log_temperature
void backward(const py::tuple& at, const py::tuple& shape, const py::tuple& scales, bool causal, float scale,
              bool interleaved, const py::tuple& grads, const py::tuple& inputs, const py::tuple& outputs) {
  const Tensors given(grads, "gradient of "), in(inputs), out(outputs, "gradient of ");
  const Call call(DtypeAndStream(at), shape, scales, causal, scale, interleaved, in);
  const ScaleAttentionSizes& n = call.n;
  ScaleAttentionBackward a{};
  a.grad_out = call.queries(given, 0, "out");
  a.q = call.queries(in, 0, "q");
  a.k = call.keys(in, 1, "k");
  a.v = call.keys(in, 2, "v");
  a.dq = call.queries(out, 0, "q");
  a.dk = call.keys(out, 1, "k");
  a.dv = call.keys(out, 2, "v");
  if (n.log_temperature != nullptr) a.dlog_temperature = out.dense<float>(3, "log_temperature", {n.H});
  const auto kernel = present(call.kernels.backward);
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> workspace(new float[call.kernels.backward_workspace(n)]);
  kernel(a, n, workspace.get());
}

}  // namespace

void bind_scale_attention(py::module_& m) {
  m.def("scale_attention_forward", &forward);
  m.def("scale_attention_backward", &backward);
}

}  // namespace mvar
