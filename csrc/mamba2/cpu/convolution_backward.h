// The backward of the mixer's convolution, over all tokens of a block of channels.
#pragma once

#include "mamba2/cpu/convolution.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::MixerBackward;

// Tokens whose gradients of the weights are summed before they are added to the rest.
constexpr int64_t kConvTokens = 64;

// One vector of channels. dxbc holds the gradient dv of the convolution's output; from the first token on it
// becomes that of the input. Rows of [state, xbc] are counted from the state's first; row r is in the windows of tokens
// r − taps + 1 … r, times the weight k in that of token r − k.
struct ChannelVector {
  const MixerBackward& a;
  const Sizes& n;
  int64_t b, c;    // sample and first channel of [x, B, C]
  float* weights;  // of these channels: lines of kConvBlock floats
  float* sums;     // as many; scratch

  // Gradients of row r and, added, of the weights and the bias. kInside: row r is xbc's, and all its tokens are there;
  // they still hold dv.
  template <bool kInside, typename T, typename Lanes>
  MVAR_INLINE void take_row(int64_t r, const T& weight, T& dweight, Vec& dbias, Lanes lanes) const {
    const int64_t l = r - (n.taps - 1);
    const bool before = !kInside && l < 0;
    const Vec x = load((before ? row<float>(a.forward.conv_state, b, r) : row<float>(a.forward.xbc, b, l)) + c, lanes);
    Vec dx{};
    for (int64_t k = 0; k < weight.count(); ++k) {
      if (!kInside && (r - k < 0 || r - k >= n.L)) continue;
      const Vec dv = load(row<float>(a.dxbc, b, r - k) + c, lanes);
      dx = fma(weight.get(k), dv, dx);
      dweight.set(k, fma(dv, x, dweight.get(k)));
      if (k == 0) dbias += dv;
    }
    if (!kInside && r >= n.L) dx += load(row<float>(a.grad_last_conv, b, r - n.L) + c, lanes);
    store((before ? row<float>(a.dconv_state, b, r) : row<float>(a.dxbc, b, l)) + c, dx, lanes);
  }

  // dconv: (taps+1, channels) from the first of these channels on, added to
  template <int known, typename Lanes>
  MVAR_INLINE void run(float* dconv, int64_t channels, Lanes lanes) const {
    Taps<known> weight(weights, kConvBlock, n.taps);
    weight.read();
    const int64_t rows = n.taps - 1 + n.L;
    for (int64_t first = 0; first < rows; first += kConvTokens) {
      const int64_t end = first + kConvTokens < rows ? first + kConvTokens : rows;
      Taps<known> dweight(sums, kConvBlock, n.taps);
      for (int64_t k = 0; k < dweight.count(); ++k) dweight.set(k, Vec{});
      Vec dbias{};
      for (int64_t r = first; r < end; ++r) {
        if (r >= n.taps - 1 && r < n.L) {
          take_row<true>(r, weight, dweight, dbias, lanes);
        } else {
          take_row<false>(r, weight, dweight, dbias, lanes);
        }
      }
      float* to = dconv;
      for (int64_t k = 0; k < dweight.count(); ++k, to += channels) {
        store(to, load(to, lanes) + dweight.get(k), lanes);
      }
      store(to, load(to, lanes) + dbias, lanes);
    }
  }
};

// weights: twice taps+1 lines of kConvBlock floats of scratch
void derive_convolution(const MixerBackward& a, const Sizes& n, int64_t b, const ChannelRun& run, float* weights,
                        float* dconv) {
  const int64_t channels = n.H * n.P + 2 * n.N;
  gather_weights(a.forward.conv_weight, a.forward.conv_bias, n.taps, {run.channel, run.count, kConvBlock}, weights);
  float* sums = weights + (n.taps + 1) * kConvBlock;
  with_taps(n.taps, [&](auto known) MVAR_INLINE_LAMBDA {
    for (int64_t j = 0; j < run.count; j += kWidth) {
      const ChannelVector vector{a, n, b, run.channel + j, weights + j, sums + j};
      with_lanes(run.count - j, [&](auto lanes) MVAR_INLINE_LAMBDA {
        vector.run<decltype(known)::value>(dconv + run.first + j, channels, lanes);
      });
    }
  });
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
