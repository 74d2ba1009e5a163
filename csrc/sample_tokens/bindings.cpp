#include "common/binding.h"

#include <memory>

#include "sample_tokens/sample_tokens.h"

namespace mvar {
namespace {

const SampleTokensKernels* const tables[] = MVAR_TABLES(sample_tokens);

Tokens tokens(Pointer data, const py::tuple& strides) {
  return {(void*)data, entry(strides, 0), entry(strides, 1)};
}

// As Python passes it: shape, cond, its strides, uncond (0: none), its strides, image_index, its stride,
// and the options in the order of the op.
struct Call {
  DrawSizes n;
  Draw draw;
  std::unique_ptr<float[]> workspace;

  Call(const py::tuple& shape, Pointer cond, const py::tuple& cond_strides, Pointer uncond,
       const py::tuple& uncond_strides, Pointer image_index, int64_t image_index_stride,
       const py::tuple& options)
      : n{entry(shape, 0), entry(shape, 1), entry(shape, 2)},
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

void sample(bool bf16, const py::tuple& shape, Pointer cond, const py::tuple& cond_strides, Pointer uncond,
            const py::tuple& uncond_strides, Pointer image_index, int64_t image_index_stride,
            const py::tuple& options, Pointer out) {
  const Call call(shape, cond, cond_strides, uncond, uncond_strides, image_index, image_index_stride, options);
  const SampleTokensKernels& kernels = *tables[current];
  py::gil_scoped_release release;
  (bf16 ? kernels.sample_bf16 : kernels.sample_f32)(call.draw, call.n, (int64_t*)out,
                                                    call.workspace.get());
}

void soften(bool bf16, const py::tuple& shape, Pointer cond, const py::tuple& cond_strides, Pointer uncond,
            const py::tuple& uncond_strides, Pointer image_index, int64_t image_index_stride,
            const py::tuple& options, bool codebook_bf16, Pointer codebook, int64_t codebook_stride,
            int64_t width, float sharpness, float temperature, Pointer out) {
  const Call call(shape, cond, cond_strides, uncond, uncond_strides, image_index, image_index_stride, options);
  const Softening soft{(const void*)codebook, codebook_stride, width, sharpness, temperature};
  const SampleTokensKernels& kernels = *tables[current];
  const auto of_f32 = codebook_bf16 ? kernels.soft_f32_bf16 : kernels.soft_f32_f32;
  const auto of_bf16 = codebook_bf16 ? kernels.soft_bf16_bf16 : kernels.soft_bf16_f32;
  py::gil_scoped_release release;
  (bf16 ? of_bf16 : of_f32)(call.draw, soft, call.n, (void*)out, call.workspace.get());
}

}  // namespace

void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens", &sample);
  m.def("soft_embedding", &soften);
}

}  // namespace mvar
