// The backward of the mixer's convolution, over all tokens of a block of channels.
#pragma once

#include "mamba2/cpu/convolution.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::MixerBackward;

// Tokens whose gradients of the weights are summed before they are added to the rest.
constexpr int64_t kConvTokens = 64;

// out = the slope of SiLU at the convolution, `tokens` lines
void convolution_slopes(const float* rows, const float* weights, int64_t tokens, int64_t taps, int64_t width,
                        float* out) {
  for (int64_t j = 0; j < width; j += kWidth) {
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec v = convolved(rows + t * width + j, weights + j, taps, width);
      store(out + t * width + j, silu_slope(v, sigmoid(v)), All{});
    }
  }
}

// One vector of channels. dxbc holds the gradient dv of the convolution's output; from the first token on it
// becomes that of the input: row l + taps − 1 − k of [state, xbc] times weight k is in token l's sum.
struct ChannelVector {
  const MixerBackward& a;
  const Sizes& n;
  int64_t b, c;          // sample and first channel
  const float* weights;  // of these channels: lines of kConvBlock floats

  // Rows of [state, xbc] are counted from the state's first.
  MVAR_INLINE const float* input(int64_t r) const {
    const int64_t l = r - (n.taps - 1);
    return (l < 0 ? row<float>(a.forward.conv_state, b, r) : row<float>(a.forward.xbc, b, l)) + c;
  }

  MVAR_INLINE float* output(int64_t r) const {
    const int64_t l = r - (n.taps - 1);
    return (l < 0 ? row<float>(a.dconv_state, b, r) : row<float>(a.dxbc, b, l)) + c;
  }

  // Row r's gradient: from the tokens whose windows it is in, all of which still hold dv, and from the state
  // handed on.
  template <typename Lanes>
  MVAR_INLINE Vec input_gradient(int64_t r, Lanes lanes) const {
    Vec sum{};
    for (int64_t k = 0; k < n.taps; ++k) {
      const int64_t l = r - k;
      if (l < 0 || l >= n.L) continue;
      sum = fma(load(weights + k * kConvBlock, All{}), load(row<float>(a.dxbc, b, l) + c, lanes), sum);
    }
    if (r >= n.L) sum += load(row<float>(a.grad_last_conv, b, r - n.L) + c, lanes);
    return sum;
  }

  // dconv: (taps+1, channels), added to
  template <typename Lanes>
  void run(float* dconv, int64_t channels, Lanes lanes) const {
    for (int64_t k = 0; k <= n.taps; ++k) {
      for (int64_t first = 0; first < n.L; first += kConvTokens) {
        const int64_t end = first + kConvTokens < n.L ? first + kConvTokens : n.L;
        Vec sum{};
        for (int64_t l = first; l < end; ++l) {
          const Vec dv = load(row<float>(a.dxbc, b, l) + c, lanes);
          sum = k < n.taps ? fma(dv, load(input(l + k), lanes), sum) : sum + dv;
        }
        float* to = dconv + k * channels + c;
        store(to, load(to, lanes) + sum, lanes);
      }
    }
    for (int64_t r = 0; r < n.taps - 1 + n.L; ++r) store(output(r), input_gradient(r, lanes), lanes);
  }
};

// weights: taps+1 lines of kConvBlock floats of scratch
void derive_convolution(const MixerBackward& a, const Sizes& n, int64_t b, int64_t first, int64_t count,
                        float* weights, float* dconv) {
  const int64_t channels = n.H * n.P + 2 * n.N;
  gather_weights(a.forward.conv_weight, a.forward.conv_bias, n.taps, {first, count, kConvBlock}, weights);
  for_each_vector(count, [&](int64_t j, auto lanes, int) MVAR_INLINE_LAMBDA {
    ChannelVector{a, n, b, first + j, weights + j}.run(dconv, channels, lanes);
  });
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
