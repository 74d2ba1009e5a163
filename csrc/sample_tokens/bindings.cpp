#include "common/binding.h"

#include <memory>

#include "sample_tokens/sample_tokens.h"

namespace mvar {
namespace {

const SampleTokensKernels* const tables[] = MVAR_TABLES(sample_tokens);

// where: the dtype's index and, on a GPU, the stream; inputs: cond, uncond, image_index; the options in the order of
// the op.
struct Call {
  DrawSizes n;
  Draw draw;
  std::unique_ptr<float[]> workspace;

  Call(const py::tuple& where, const py::tuple& shape, const Tensors& in, const py::tuple& options)
      : n{entry(shape, 0), entry(shape, 1), entry(shape, 2), (void*)entry(where, 1)},
        draw{in.tokens(0),
             in.tokens(1),
             in.data<const int64_t>(2),
             entry(in.strides(2), 0),
             (float)py::cast<double>(options[0]),
             entry(options, 1),
             py::cast<double>(options[2]),
             (const uint64_t*)py::cast<Pointer>(options[3]),
             py::cast<uint32_t>(options[4])},
        workspace(new float[tables[current]->workspace(n.V)]) {}
};

void sample(const py::tuple& where, const py::tuple& shape, const py::tuple& inputs, const py::tuple& options,
            Pointer out) {
  const Call call(where, shape, Tensors(inputs), options);
  const auto kernel = tables[current]->sample[entry(where, 0)];
  py::gil_scoped_release release;
  kernel(call.draw, call.n, (int64_t*)out, call.workspace.get());
}

// inputs: and the codebook, (V, width)
void soften(const py::tuple& where, const py::tuple& shape, const py::tuple& inputs, const py::tuple& options,
            int codebook_dtype, int64_t width, float sharpness, float temperature, Pointer out) {
  const Tensors in(inputs);
  const Call call(where, shape, in, options);
  const Softening soft{in.data<const void>(3), entry(in.strides(3), 0), width, sharpness, temperature};
  const auto kernel = tables[current]->soften[entry(where, 0)][codebook_dtype];
  py::gil_scoped_release release;
  kernel(call.draw, soft, call.n, (void*)out, call.workspace.get());
}

}  // namespace

void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens", &sample);
  m.def("soft_embedding", &soften);
}

}  // namespace mvar
