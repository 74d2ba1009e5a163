#include "common/binding.h"

#include <memory>

#include "sample_tokens/sample_tokens.h"

namespace mvar {
namespace {

const SampleTokensKernels* const tables[] = MVAR_TABLES(sample_tokens);

// options: guidance, top_k, top_p, temperature, scale_index, samples; inputs: cond, uncond or None, image_index,
// seed, per_image or None.
struct Call {
  const Dtype dtype;
  SamplingSizes n;
  Sampling sampling;
  std::unique_ptr<float[]> workspace;

  Call(const DtypeAndStream& at, const py::tuple& shape, const py::tuple& options, const Tensors& in)
      : dtype(at.dtype), n{entry(shape, 0), entry(shape, 1), entry(shape, 2), at.stream}, sampling{} {
    sampling.cond = in.tokens(0, "cond", {n.B, n.L, n.V}, kItemsizes[dtype]);
    if (in.has(1)) sampling.uncond = in.tokens(1, "uncond", {n.B, n.L, n.V}, kItemsizes[dtype]);
    const auto image_index = in.view(2, "image_index", {n.B}, sizeof(int64_t));
    sampling.image_index = (const int64_t*)image_index.data;
    sampling.image_index_stride = image_index.strides[0];
    sampling.seed = in.scalar<const uint64_t>(3, "seed");
    if (in.has(4)) sampling.per_image = in.dense<const double>(4, "per_image", {n.B, 4});
    sampling.filters = {(float)py::cast<double>(options[0]), entry(options, 1), py::cast<double>(options[2]),
                        (float)py::cast<double>(options[3])};
    sampling.scale_index = py::cast<uint32_t>(options[4]);
    sampling.samples = entry(options, 5);
    workspace.reset(new float[tables[current]->workspace(n.V)]);
  }
};

// outputs: the tokens
void sample(const py::tuple& at, const py::tuple& shape, const py::tuple& options, const py::tuple& inputs,
            const py::tuple& outputs) {
  const Call call(DtypeAndStream(at), shape, options, Tensors(inputs));
  int64_t* const tokens = Tensors(outputs).dense<int64_t>(0, "tokens", {call.n.B, call.n.L * call.sampling.samples});
  const auto kernel = present(tables[current]->sample[call.dtype]);
  py::gil_scoped_release release;
  kernel(call.sampling, call.n, tokens, call.workspace.get());
}

// options: and the dtype and the width of the codebook, sharpness, temperature; inputs: and the codebook (V, width);
// outputs: the mean
void soft_embedding(const py::tuple& at, const py::tuple& shape, const py::tuple& options, const py::tuple& inputs,
                    const py::tuple& outputs) {
  const Tensors in(inputs);
  const Call call(DtypeAndStream(at), shape, options, in);
  const Dtype dtype = DtypeAndStream::checked(entry(options, 6));
  const int64_t width = entry(options, 7);
  const PerSample codebook = in.per_sample(5, "codebook", {call.n.V, width}, kItemsizes[dtype]);
  const SoftEmbedding soft{codebook.data, codebook.batch_stride, width, py::cast<float>(options[8]),
                           py::cast<float>(options[9])};
  void* const mean = Tensors(outputs).dense<char>(0, "mean", {call.n.B, call.n.L, width}, kItemsizes[dtype]);
  const auto kernel = present(tables[current]->soft_embedding[call.dtype][dtype]);
  py::gil_scoped_release release;
  kernel(call.sampling, soft, call.n, mean, call.workspace.get());
}

}  // namespace

void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens", &sample);
  m.def("soft_embedding", &soft_embedding);
}

}  // namespace mvar
