#include "common/binding.h"

#include <memory>

#include "sample_tokens/sample_tokens.h"

namespace mvar {
namespace {

const SampleTokensKernels* const tables[] = MVAR_TABLES(sample_tokens);

Tokens tokens(Pointer data, const py::tuple& strides) {
  return {(void*)data, entry(strides, 0), entry(strides, 1)};
}

// As Python passes it: where (the dtype's index and, on a GPU, the stream), shape, cond, its strides, uncond (0: none),
// its strides, image_index, its stride, and the options in the order of the op.
struct Call {
  DrawSizes n;
  Draw draw;
  std::unique_ptr<float[]> workspace;

  Call(const py::tuple& where, const py::tuple& shape, Pointer cond, const py::tuple& cond_strides, Pointer uncond,
       const py::tuple& uncond_strides, Pointer image_index, int64_t image_index_stride,
       const py::tuple& options)
      : n{entry(shape, 0), entry(shape, 1), entry(shape, 2), (void*)entry(where, 1)},
        draw{tokens(cond, cond_strides),
             tokens(uncond, uncond_strides),
             (const int64_t*)image_index,
             image_index_stride,
             (float)py::cast<double>(options[0]),
             entry(options, 1),
             py::cast<double>(options[2]),
             (const uint64_t*)py::cast<Pointer>(options[3]),
             py::cast<uint32_t>(options[4])},
        workspace(new float[tables[current]->workspace(n.V)]) {}
};

void sample(const py::tuple& where, const py::tuple& shape, Pointer cond, const py::tuple& cond_strides, Pointer uncond,
            const py::tuple& uncond_strides, Pointer image_index, int64_t image_index_stride,
            const py::tuple& options, Pointer out) {
  const Call call(where, shape, cond, cond_strides, uncond, uncond_strides, image_index, image_index_stride, options);
  const auto kernel = tables[current]->sample[entry(where, 0)];
  py::gil_scoped_release release;
  kernel(call.draw, call.n, (int64_t*)out, call.workspace.get());
}

void soften(const py::tuple& where, const py::tuple& shape, Pointer cond, const py::tuple& cond_strides, Pointer uncond,
            const py::tuple& uncond_strides, Pointer image_index, int64_t image_index_stride,
            const py::tuple& options, int codebook_dtype, Pointer codebook, int64_t codebook_stride,
            int64_t width, float sharpness, float temperature, Pointer out) {
  const Call call(where, shape, cond, cond_strides, uncond, uncond_strides, image_index, image_index_stride, options);
  const Softening soft{(const void*)codebook, codebook_stride, width, sharpness, temperature};
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
