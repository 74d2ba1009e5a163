// SiLU(GroupNorm(x)) on CPU. Forward: statistics, then output; backward: statistics again, the sums that the gradients
// need, then dx. A sample's numbers come from memory once, if they fit the second-level cache: threads take whole
// samples, and only where there are fewer samples than threads do they share each one.
//
// A sample is cut into blocks of positions, whose partial sums are added in order; what the blocks are follows from the
// sizes alone.
//
// Statistics: a channel's numbers of a block are counted from the first of them, its anchor. However far the mean is
// from zero, the sum of squares loses at most a factor of the block's length in accuracy (even if the anchor is the only
// number far from the others), and of a constant group exactly nothing is left. A mean is kept as two floats.

#include "group_norm_silu.h"

#include "common/activations.h"
#include "common/simd.h"
#include "common/threads.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Below this many elements starting the threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;

// A sample's numbers: rows of positions (channels last) or of channels.
template <typename T>
struct Map {
  T* data;
  int64_t stride;

  Map(const Tokens& t, int64_t b) : data((T*)t.data + b * t.batch_stride), stride(t.row_stride) {}
  MVAR_INLINE T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// The two memory formats. A strip is what shares its constants: channels last, the positions of as many channels as a
// vector has, whose constants are vectors; else the positions of one channel.
template <bool channels_last>
struct Layout;

template <>
struct Layout<true> {
  static int64_t positions(int64_t C) {  // of a block, which is to stay in the first-level cache
    const int64_t fit = (1 << 14) / C;
    return fit < 16 ? 16 : fit > 512 ? 512 : fit;
  }
  template <typename Body>
  static MVAR_INLINE void for_each_strip(int64_t C, Body body) {
    for (int64_t c = 0; c < C; c += kWidth) {
      with_lanes(C - c, [&](auto lanes) MVAR_INLINE_LAMBDA { body(c, lanes); });
    }
  }
  // body(row, column, lanes, slot) for every vector of a strip's positions from `first` to `last`. A short body, with
  // `slots` partial sums, must not wait for its last addition; a long one is not unrolled.
  template <int slots, typename Lanes, typename Body>
  static MVAR_INLINE void for_each_vector_of(int64_t c, Lanes lanes, int64_t first, int64_t last, Body body) {
    int64_t l = first;
    for (; slots == kSlots && l + kSlots <= last; l += kSlots) {
      body(l, c, lanes, 0);
      body(l + 1, c, lanes, 1);
      body(l + 2, c, lanes, 2);
      body(l + 3, c, lanes, 3);
    }
    for (; l < last; ++l) body(l, c, lanes, 0);
  }
  template <typename Lanes>
  static MVAR_INLINE Vec constant(const float* of_channels, int64_t c, Lanes lanes) {
    return load(of_channels + c, lanes);
  }
  // The strip's numbers at a position, which `of_channels` keeps.
  template <typename T, typename Lanes>
  static MVAR_INLINE Vec anchor(Map<const T> x, int64_t c, int64_t l, Lanes lanes, float* of_channels) {
    const Vec found = load(x.at(l, c), lanes);
    store(of_channels + c, found, lanes);
    return found;
  }
  template <typename Lanes>
  static MVAR_INLINE void keep_total(float* of_channels, int64_t c, Vec total, Lanes lanes) {
    store(of_channels + c, total, lanes);
  }
};

template <>
struct Layout<false> {
  static int64_t positions(int64_t) { return 512; }
  template <typename Body>
  static MVAR_INLINE void for_each_strip(int64_t C, Body body) {
    for (int64_t c = 0; c < C; ++c) body(c, All{});
  }
  template <int slots, typename Body>
  static MVAR_INLINE void for_each_vector_of(int64_t c, All, int64_t first, int64_t last, Body body) {
    if constexpr (slots == kSlots) {
      for_each_vector(last - first, [&](int64_t i, auto lanes, int slot) MVAR_INLINE_LAMBDA {
        body(c, first + i, lanes, slot);
      });
    } else {
      for (; first + kWidth <= last; first += kWidth) body(c, first, All{}, 0);
      if (first < last) body(c, first, First{last - first}, 0);
    }
  }
  static MVAR_INLINE Vec constant(const float* of_channels, int64_t c, All) { return splat(of_channels[c]); }
  template <typename T>
  static MVAR_INLINE Vec anchor(Map<const T> x, int64_t c, int64_t l, All, float* of_channels) {
    of_channels[c] = load(x.at(c, l), First{1})[0];
    return splat(of_channels[c]);
  }
  static MVAR_INLINE void keep_total(float* of_channels, int64_t c, Vec total, All) { of_channels[c] = sum(total); }
};

MVAR_INLINE int64_t positions(const GroupNormSizes& n) {
  return n.channels_last ? Layout<true>::positions(n.C) : Layout<false>::positions(n.C);
}

MVAR_INLINE int64_t blocks(const GroupNormSizes& n) { return (n.L + positions(n) - 1) / positions(n); }

bool worth_threads(const GroupNormSizes& n) { return n.B * n.C * n.L > kParallelElements; }

bool threads_take_samples(const GroupNormSizes& n) { return worth_threads(n) && n.B >= threads(); }

// Of a group; where there is none, 1, and its statistics are those of zero.
double numbers(const GroupNormSizes& n) { return (double)(n.C / n.groups) * (double)(n.L > 0 ? n.L : 1); }

// What a thread (or, of a shared sample, all of them) keeps of a sample.
struct Sample {
  // Of channels, with d = x − mean: v = d·scale + shift, dx = (dv·weight − level + d·slope)·rstd.
  float *mean, *scale, *shift, *slope, *level, *rstd;
  float* rest;     // of groups: what the rounded mean misses of the mean
  float* partial;  // (blocks, kPartials, C): the blocks' anchors and sums
  int64_t floats;  // of all these

  static constexpr int64_t kPartials = 3;

  Sample(const GroupNormSizes& n, float* memory) {
    Carver carver(memory);
    float** const of_channels[] = {&mean, &scale, &shift, &slope, &level, &rstd};
    for (float** array : of_channels) *array = carver.take(n.C);
    rest = carver.take(n.groups);
    partial = carver.take(blocks(n) * kPartials * n.C);
    floats = carver.needed();
  }
};

int64_t workspace(const GroupNormSizes& n) {
  return Sample(n, nullptr).floats * (threads_take_samples(n) ? threads() : 1);
}

// shared: all threads of the parallel region call it, each does its part, and they wait for each other. Otherwise the
// calling thread does all.
template <typename Body>
MVAR_INLINE void for_each(int64_t count, bool shared, Body body) {
  if (shared) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

MVAR_INLINE Vec total(const Vec (&slot)[kSlots]) { return (slot[0] + slot[1]) + (slot[2] + slot[3]); }

template <typename T, bool channels_last>
void block_statistics(Map<const T> x, const GroupNormSizes& n, int64_t first, int64_t last, float* partial) {
  using At = Layout<channels_last>;
  At::for_each_strip(n.C, [&](int64_t c, auto lanes) MVAR_INLINE_LAMBDA {
    const Vec anchor = At::anchor(x, c, first, lanes, partial);
    Vec sums[kSlots] = {}, squares[kSlots] = {};
    At::template for_each_vector_of<kSlots>(c, lanes, first, last, [&](int64_t row, int64_t col, auto lanes, int slot)
                                                      MVAR_INLINE_LAMBDA {
      const Vec d = keep(load(x.at(row, col), lanes) - anchor, lanes);
      sums[slot] += d;
      squares[slot] = fma(d, d, squares[slot]);
    });
    At::keep_total(partial + n.C, c, total(sums), lanes);
    At::keep_total(partial + 2 * n.C, c, total(squares), lanes);
  });
}

// Mean and deviation of a group from its blocks' sums, and the constants of its channels.
void group_statistics(const GroupNormSizes& n, int64_t g, const float* weight, const float* bias, const Sample& s) {
  const int64_t width = n.C / n.groups, first_c = g * width, last_c = first_c + width;
  const double count = numbers(n);
  const auto for_each_partial = [&](auto body) {
    for (int64_t k = 0; k < blocks(n); ++k) {
      const float* of_block = s.partial + k * Sample::kPartials * n.C;
      const int64_t first = k * positions(n), rest = n.L - first;
      const double length = (double)(rest < positions(n) ? rest : positions(n));
      for (int64_t c = first_c; c < last_c; ++c) {
        body(length, (double)of_block[c], (double)of_block[n.C + c], (double)of_block[2 * n.C + c]);
      }
    }
  };
  double sum = 0, squares = 0;
  for_each_partial([&](double length, double anchor, double of_d, double) { sum += length * anchor + of_d; });
  const double mean = sum / count;
  for_each_partial([&](double length, double anchor, double of_d, double of_d2) {
    const double off = anchor - mean;  // Σ (d + off)²
    squares += of_d2 + off * (2 * of_d + length * off);
  });
  const float rstd = (float)(1 / __builtin_sqrt((squares > 0 ? squares : 0) / count + (double)n.eps));
  s.rest[g] = (float)(mean - (double)(float)mean);
  for (int64_t c = first_c; c < last_c; ++c) {
    s.mean[c] = (float)mean;
    s.rstd[c] = rstd;
    s.scale[c] = rstd * weight[c];
    s.shift[c] = bias[c] - s.rest[g] * s.scale[c];
  }
}

template <typename T, bool channels_last>
void block_output(Map<const T> x, Map<T> out, const GroupNormSizes& n, int64_t first, int64_t last, const Sample& s) {
  using At = Layout<channels_last>;
  At::for_each_strip(n.C, [&](int64_t c, auto lanes) MVAR_INLINE_LAMBDA {
    const Vec mean = At::constant(s.mean, c, lanes), scale = At::constant(s.scale, c, lanes);
    const Vec shift = At::constant(s.shift, c, lanes);
    At::template for_each_vector_of<1>(c, lanes, first, last, [&](int64_t row, int64_t col, auto lanes, int) MVAR_INLINE_LAMBDA {
      const Vec d = load(x.at(row, col), lanes) - mean;
      store(out.at(row, col), silu(fma(d, scale, shift)), lanes);
    });
  });
}

// With dv the gradient at v: each channel's sums of dv and of dv·d.
template <typename T, bool channels_last>
void block_sums(Map<const T> grad, Map<const T> x, const GroupNormSizes& n, int64_t first, int64_t last, const Sample& s,
                float* partial) {
  using At = Layout<channels_last>;
  At::for_each_strip(n.C, [&](int64_t c, auto lanes) MVAR_INLINE_LAMBDA {
    const Vec mean = At::constant(s.mean, c, lanes), scale = At::constant(s.scale, c, lanes);
    const Vec shift = At::constant(s.shift, c, lanes);
    Vec sums{}, products{};
    At::template for_each_vector_of<1>(c, lanes, first, last, [&](int64_t row, int64_t col, auto lanes, int)
                                                      MVAR_INLINE_LAMBDA {
      const Vec d = load(x.at(row, col), lanes) - mean, v = fma(d, scale, shift);
      const Vec dv = keep(load(grad.at(row, col), lanes) * silu_slope(v, sigmoid(v)), lanes);
      sums += dv;
      products = fma(dv, d, products);
    });
    At::keep_total(partial, c, sums, lanes);
    At::keep_total(partial + n.C, c, products, lanes);
  });
}

// Gradients of a group's weight and bias from its blocks' sums, and the constants of dx, which is
// (dv·w − mean(dv·w) − y·mean(dv·w·y))·rstd with y = (d − rest)·rstd.
void group_gradients(const GroupNormSizes& n, int64_t g, const float* weight, float* dweight, float* dbias,
                     const Sample& s) {
  const int64_t width = n.C / n.groups, first_c = g * width, last_c = first_c + width;
  const double count = numbers(n), rstd = s.rstd[first_c], rest = s.rest[g];
  double w_sum = 0, wy_sum = 0;
  for (int64_t c = first_c; c < last_c; ++c) {
    double sum = 0, product = 0;
    for (int64_t k = 0; k < blocks(n); ++k) {
      sum += (double)s.partial[k * Sample::kPartials * n.C + c];
      product += (double)s.partial[(k * Sample::kPartials + 1) * n.C + c];
    }
    const double of_y = rstd * (product - rest * sum);
    dweight[c] = (float)of_y;
    dbias[c] = (float)sum;
    w_sum += (double)weight[c] * sum;
    wy_sum += (double)weight[c] * of_y;
  }
  const double slope = -rstd * wy_sum / count, level = w_sum / count + rest * slope;
  for (int64_t c = first_c; c < last_c; ++c) {
    s.slope[c] = (float)slope;
    s.level[c] = (float)level;
  }
}

template <typename T, bool channels_last>
void block_dx(Map<const T> grad, Map<const T> x, Map<T> dx, const GroupNormSizes& n, int64_t first, int64_t last,
              const float* weight, const Sample& s) {
  using At = Layout<channels_last>;
  At::for_each_strip(n.C, [&](int64_t c, auto lanes) MVAR_INLINE_LAMBDA {
    const Vec mean = At::constant(s.mean, c, lanes), scale = At::constant(s.scale, c, lanes);
    const Vec shift = At::constant(s.shift, c, lanes), slope = At::constant(s.slope, c, lanes);
    const Vec level = At::constant(s.level, c, lanes), rstd = At::constant(s.rstd, c, lanes);
    const Vec w = At::constant(weight, c, lanes);
    At::template for_each_vector_of<1>(c, lanes, first, last, [&](int64_t row, int64_t col, auto lanes, int) MVAR_INLINE_LAMBDA {
      const Vec d = load(x.at(row, col), lanes) - mean, v = fma(d, scale, shift);
      const Vec dv = load(grad.at(row, col), lanes) * silu_slope(v, sigmoid(v));
      // No fma in the difference: of a group of one number nothing is left.
      store(dx.at(row, col), fma(d, slope, dv * w - level) * rstd, lanes);
    });
  });
}

// body(b, s, for_blocks, for_groups) for every sample: for_blocks(work) runs work(first, last, partial) for the positions
// of each block, for_groups(work) runs work(g) for each group. There is one parallel region per call, since GCC's OpenMP
// starts new threads for a region inside of another one, even of a single thread: 0.1 ms or more (a virtual AMD Zen 4).
template <typename Body>
void for_each_sample(const GroupNormSizes& n, float* workspace, Body body) {
  const bool whole = threads_take_samples(n);
  const int64_t floats = Sample(n, nullptr).floats;
#pragma omp parallel if (worth_threads(n))
  for_each(n.B, whole, [&](int64_t b) {
    const Sample s(n, workspace + (whole ? this_thread() * floats : 0));
    const auto for_blocks = [&](auto work) {
      for_each(blocks(n), !whole, [&](int64_t k) {
        const int64_t first = k * positions(n), last = first + positions(n);
        work(first, last < n.L ? last : n.L, s.partial + k * Sample::kPartials * n.C);
      });
    };
    const auto for_groups = [&](auto work) { for_each(n.groups, !whole, work); };
    body(b, s, for_blocks, for_groups);
  });
}

template <typename T, bool channels_last>
void forward_in(const GroupNormForward& a, const GroupNormSizes& n, float* workspace) {
  for_each_sample(n, workspace, [&](int64_t b, const Sample& s, auto for_blocks, auto for_groups) {
    const Map<const T> x(a.x, b);
    const Map<T> out(a.out, b);
    for_blocks([&](int64_t first, int64_t last, float* partial) {
      block_statistics<T, channels_last>(x, n, first, last, partial);
    });
    for_groups([&](int64_t g) { group_statistics(n, g, a.weight, a.bias, s); });
    for_blocks([&](int64_t first, int64_t last, float*) { block_output<T, channels_last>(x, out, n, first, last, s); });
  });
}

template <typename T, bool channels_last>
void backward_in(const GroupNormBackward& a, const GroupNormSizes& n, float* workspace) {
  for_each_sample(n, workspace, [&](int64_t b, const Sample& s, auto for_blocks, auto for_groups) {
    const Map<const T> grad(a.grad_out, b), x(a.x, b);
    const Map<T> dx(a.dx, b);
    for_blocks([&](int64_t first, int64_t last, float* partial) {
      block_statistics<T, channels_last>(x, n, first, last, partial);
    });
    for_groups([&](int64_t g) { group_statistics(n, g, a.weight, a.bias, s); });
    for_blocks([&](int64_t first, int64_t last, float* partial) {
      block_sums<T, channels_last>(grad, x, n, first, last, s, partial);
    });
    for_groups([&](int64_t g) { group_gradients(n, g, a.weight, a.dweight + b * n.C, a.dbias + b * n.C, s); });
    for_blocks([&](int64_t first, int64_t last, float*) {
      block_dx<T, channels_last>(grad, x, dx, n, first, last, a.weight, s);
    });
  });
}

template <typename T>
void forward(const GroupNormForward& a, const GroupNormSizes& n, float* workspace) {
  n.channels_last ? forward_in<T, true>(a, n, workspace) : forward_in<T, false>(a, n, workspace);
}

template <typename T>
void backward(const GroupNormBackward& a, const GroupNormSizes& n, float* workspace) {
  n.channels_last ? backward_in<T, true>(a, n, workspace) : backward_in<T, false>(a, n, workspace);
}

}  // namespace

const GroupNormKernels group_norm_silu = {
    {{forward<float>, backward<float>}, {forward<bf16>, backward<bf16>}},
    workspace,
};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
