#include "common/binding.h"

#include <memory>

#include "sample_tokens/sample_tokens.h"

namespace mvar {
namespace {

const SampleTokensKernels* const tables[] = MVAR_TABLES(sample_tokens);

// where: the dtype's index and, on a GPU, the stream; inputs: cond, uncond or None, image_index, seed; the options in
// the order of the op.
struct Call {
  const Dtype dtype;
  DrawSizes n;
  Draw draw;
  std::unique_ptr<float[]> workspace;

  Call(const Where& where, const py::tuple& shape, const Tensors& in, const py::tuple& options)
      : dtype(where.dtype), n{entry(shape, 0), entry(shape, 1), entry(shape, 2), where.stream}, draw{} {
    draw.cond = in.tokens(0, "cond", {n.B, n.L, n.V}, kItemsizes[dtype]);
    if (in.has(1)) draw.uncond = in.tokens(1, "uncond", {n.B, n.L, n.V}, kItemsizes[dtype]);
    const auto image_index = in.view(2, "image_index", {n.B}, sizeof(int64_t));
    draw.image_index = (const int64_t*)image_index.data;
    draw.image_index_stride = image_index.strides[0];
    draw.seed = in.scalar<const uint64_t>(3, "seed");
    draw.guidance = (float)py::cast<double>(options[0]);
    draw.top_k = entry(options, 1);
    draw.top_p = py::cast<double>(options[2]);
    draw.scale_index = py::cast<uint32_t>(options[3]);
    workspace.reset(new float[tables[current]->workspace(n.V)]);
  }
};

// outputs: the tokens
void sample(const py::tuple& where, const py::tuple& shape, const py::tuple& inputs, const py::tuple& options,
            const py::tuple& outputs) {
  const Call call(Where(where), shape, Tensors(inputs), options);
  int64_t* const tokens = Tensors(outputs).dense<int64_t>(0, "tokens", {call.n.B, call.n.L});
  const auto kernel = present(tables[current]->sample[call.dtype]);
  py::gil_scoped_release release;
  kernel(call.draw, call.n, tokens, call.workspace.get());
}

// inputs: and the codebook, (V, width); outputs: the mean
void soften(const py::tuple& where, const py::tuple& shape, const py::tuple& inputs, const py::tuple& options,
            int64_t codebook_dtype, int64_t width, float sharpness, float temperature, const py::tuple& outputs) {
  const Tensors in(inputs);
  const Call call(Where(where), shape, in, options);
  const Dtype dtype = Where::checked(codebook_dtype);
  const PerSample codebook = in.per_sample(4, "codebook", {call.n.V, width}, kItemsizes[dtype]);
  const Softening soft{codebook.data, codebook.batch_stride, width, sharpness, temperature};
  void* const mean = Tensors(outputs).dense<char>(0, "mean", {call.n.B, call.n.L, width}, kItemsizes[dtype]);
  const auto kernel = present(tables[current]->soften[call.dtype][dtype]);
  py::gil_scoped_release release;
  kernel(call.draw, soft, call.n, mean, call.workspace.get());
}

}  // namespace

void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens", &sample);
  m.def("soft_embedding", &soften);
}

}  // namespace mvar
