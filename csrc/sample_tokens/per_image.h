// The filters of one image, wherever they are.
#pragma once

#include "noise.h"
#include "sample_tokens.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

MVAR_INLINE Filters filters_of(const Sampling& sampling, int64_t image) {
  if (!sampling.per_image) return sampling.filters;
  const double* const numbers = sampling.per_image + 4 * image;
  return {(float)numbers[0], (int64_t)numbers[1], numbers[2], (float)numbers[3]};
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
