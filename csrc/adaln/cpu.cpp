// adaLN on CPU. A row is read from memory once: while it is in the first-level cache it is summed,
// its centred squares are summed (two passes, so that a large mean costs no accuracy), and it is
// normalised and modulated.
//
// The mean is rounded. The second pass also sums what is centred, and so finds what the rounding left, `rest`: for a
// constant row of 12345.678 it is 10⁻³, which 1/√eps would make 1. Nothing is left of such a row, to the bit, because
// multiples of the same ulp are subtracted and added.

#include "adaln.h"

#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Below this many elements starting the threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;

template <typename T>
MVAR_INLINE T* row(const Tokens& t, int64_t b, int64_t l) {
  return (T*)t.data + b * t.batch_stride + l * t.row_stride;
}

template <typename T>
MVAR_INLINE T* row(const PerSample& t, int64_t b) {
  return (T*)t.data + b * t.batch_stride;
}

// A row of modulation: of T, or with options of T or float, or of zeros where there is none.
template <typename T, bool options>
struct Modulation {
  const T* narrow = nullptr;
  const float* wide = nullptr;

  Modulation(const void* data, int64_t offset, bool is_wide) {
    if (!options) {
      narrow = (const T*)data + offset;
    } else if (data != nullptr) {
      if (is_wide) wide = (const float*)data + offset;
      else narrow = (const T*)data + offset;
    }
  }
  Modulation(const PerSample& t, int64_t b, const AdalnOptions& o)
      : Modulation(t.data, b * t.batch_stride, o.wide_vectors) {}
  Modulation(const Tokens& t, int64_t b, int64_t l, const AdalnOptions& o)
      : Modulation(t.data, b * t.batch_stride + l * t.row_stride, o.wide_tokens) {}

  template <typename Lanes>
  MVAR_INLINE Vec at(int64_t c, Lanes lanes) const {
    if constexpr (!options) return load(narrow + c, lanes);
    return wide != nullptr ? load(wide + c, lanes) : narrow != nullptr ? load(narrow + c, lanes) : Vec{};
  }
};

// Writes a token's gradient, if there is such modulation.
template <typename T, typename Lanes>
MVAR_INLINE void store_gradient(const Tokens& t, int64_t b, int64_t l, const AdalnOptions& o, int64_t c, Vec v,
                                Lanes lanes) {
  if (t.data == nullptr) return;
  if (o.wide_tokens) store(row<float>(t, b, l) + c, v, lanes);
  else store(row<T>(t, b, l) + c, v, lanes);
}

// The last pass, which adds up nothing, is not unrolled with options: its body is long, and there are many of them.
template <bool options, typename Body>
MVAR_INLINE void for_each_output(int64_t n, Body body) {
  if constexpr (options) {
    for (int64_t c = 0; c < n; c += kWidth) {
      with_lanes(n - c, [&](auto lanes) MVAR_INLINE_LAMBDA { body(c, lanes, 0); });
    }
  } else {
    for_each_vector(n, body);
  }
}

// Of the sums of x − mean and of its squares; what the mean missed, `rest`, is no part of the variance.
MVAR_INLINE float inverse_deviation(float squares, float sum, float rest, int64_t C, float eps) {
  const float missed = sum * rest;
  return 1.0f / __builtin_sqrtf((squares > missed ? squares - missed : 0.0f) / (float)C + eps);
}

// In bfloat16 four rows at a time share the loads and conversions of the modulation: three quarters of the time of
// one row at a time (Zen 5, C = 1024, in the L3 cache). In float32 rows are pages of 4 KB, and as many of them at once
// as two rows have fall on the same lines of the first-level cache: a half more time, gated.
template <typename T, bool options>
constexpr int kRows = sizeof(T) == 2 && !options ? 4 : 1;

// The hardware prefetches within a page: the next rows are prefetched by hand while these are computed (float32: 85 % of
// the time). Outputs are not: if their pages are new, prefetching took five times as long as writing them.

// x is of T, branch and out are of U. With options there may be a branch or not.
template <typename T, typename U, bool gated, bool options, int rows>
void forward_rows(const AdalnForward& a, const AdalnSizes& n, int64_t b, int64_t l) {
  const Modulation<U, options> scale(a.scale, b, a.options), shift(a.shift, b, a.options);
  const T* x[rows];
  const T* x_after[rows];
  U* out[rows];
  for (int r = 0; r < rows; ++r) {
    x[r] = row<T>(a.x, b, l + r);
    x_after[r] = x[r] + rows * a.x.row_stride;
    out[r] = row<U>(a.out, b, l + r);
  }

  Sum total[rows];
  if (options ? a.branch.data != nullptr : gated) {
    const bool per_token = options && a.token_gate.data != nullptr;
    const Modulation<U, options> gate = per_token ? Modulation<U, options>(a.token_gate, b, l, a.options)
                                                  : Modulation<U, options>(a.gate, b, a.options);
    const U* branch[rows];
    T* x_new[rows];
    for (int r = 0; r < rows; ++r) {
      branch[r] = row<U>(a.branch, b, l + r);
      x_new[r] = row<T>(a.x_new, b, l + r);
    }
    for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
      const Vec g = gate.at(c, lanes);
      for (int r = 0; r < rows; ++r) {
        // Normalised is what is stored: x_new after its rounding to T.
        auto packed = Format<T>::pack(fma(g, load(branch[r] + c, lanes), load(x[r] + c, lanes)));
        store_packed(x_new[r] + c, packed, lanes);
        total[r].slot[slot] += Format<T>::unpack(packed);
        __builtin_prefetch(branch[r] + rows * a.branch.row_stride + c);
      }
    });
    for (int r = 0; r < rows; ++r) x[r] = x_new[r];
  } else {
    for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
      for (int r = 0; r < rows; ++r) total[r].slot[slot] += load(x[r] + c, lanes);
    });
  }
  Vec mean[rows];
  const bool rms = options && a.options.rms;  // then the mean is 0
  for (int r = 0; r < rows; ++r) mean[r] = rms ? Vec{} : splat(total[r].total() / (float)n.C);

  Sum squares[rows], centred_sum[rows];
  for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
    for (int r = 0; r < rows; ++r) {
      Vec centred = keep(load(x[r] + c, lanes) - mean[r], lanes);
      squares[r].slot[slot] = fma(centred, centred, squares[r].slot[slot]);
      centred_sum[r].slot[rows > 1 ? 0 : slot] += centred;  // several rows do not wait for one another
      __builtin_prefetch(x_after[r] + c);
    }
  });
  Vec rest[rows], rstd[rows];
  for (int r = 0; r < rows; ++r) {
    const float sum = rms ? 0.0f : centred_sum[r].total(), missed = sum / (float)n.C;
    rest[r] = splat(missed);
    rstd[r] = splat(inverse_deviation(squares[r].total(), sum, missed, n.C, n.eps));
  }

  const Modulation<U, options> token_scale(a.token_scale, b, l, a.options), token_shift(a.token_shift, b, l, a.options);
  const bool per_token = options && a.token_scale.data != nullptr;
  const float plus = options ? a.options.plus : 1.0f;
  for_each_output<options>(n.C, [&](int64_t c, auto lanes, int) MVAR_INLINE_LAMBDA {
    const Vec factor = plus + scale.at(c, lanes);
    const Vec offset = shift.at(c, lanes);
    for (int r = 0; r < rows; ++r) {
      Vec normal = ((load(x[r] + c, lanes) - mean[r]) - rest[r]) * rstd[r];
      Vec result = fma(normal, factor, offset);
      if (per_token) result = fma(result, 1.0f + token_scale.at(c, lanes), token_shift.at(c, lanes));
      store(out[r] + c, result, lanes);
    }
  });
}

template <typename T, typename U, bool gated, bool options>
void forward(const AdalnForward& a, AdalnSizes n) {
  constexpr int rows = kRows<T, options>;
  const int64_t groups = (n.L + rows - 1) / rows;
#pragma omp parallel for schedule(static) if (n.B * n.L * n.C > kParallelElements)
  for (int64_t i = 0; i < n.B * groups; ++i) {
    const int64_t b = i / groups, first = i % groups * rows;
    if (first + rows <= n.L) {
      forward_rows<T, U, gated, options, rows>(a, n, b, first);
    } else {
      for (int64_t l = first; l < n.L; ++l) forward_rows<T, U, gated, options, 1>(a, n, b, l);
    }
  }
}

// The (B, C) gradients are sums over a sample's rows: each block of so many rows sums its own into
// the workspace, and the blocks are added in order. The blocks are the same for any thread count.
constexpr int64_t kBlockRows = 32;

MVAR_INLINE int64_t blocks(int64_t L) { return (L + kBlockRows - 1) / kBlockRows; }

// The workspace is (B, blocks, kSums, C).
constexpr int64_t kSums = 3;

int64_t backward_workspace(AdalnSizes n) { return n.B * blocks(n.L) * kSums * n.C; }

// With g the gradient at the normalised row's multiple y·factor, grad_out or per token grad_out·(1+token_scale), and
// w = g·factor: dx = (w − mean(w) − y·mean(w·y)) / deviation. x is of T, branch and out are of U.
template <typename T, typename U, bool gated, bool options>
void backward_row(const AdalnBackward& a, const AdalnSizes& n, int64_t b, int64_t l, float* sums) {
  const AdalnOptions& o = a.options;
  const T* x = row<T>(a.x, b, l);
  const U* grad_out = row<U>(a.grad_out, b, l);
  const Modulation<U, options> scale(a.scale, b, o), token_scale(a.token_scale, b, l, o);
  const bool per_token = options && a.token_scale.data != nullptr;
  const float plus = options ? o.plus : 1.0f;
  float* dscale = sums;
  float* dshift = sums + n.C;
  float* dgate = sums + 2 * n.C;
  const auto gradient = [&](int64_t c, auto lanes) MVAR_INLINE_LAMBDA {
    const Vec grad = load(grad_out + c, lanes);
    return per_token ? grad * (1.0f + token_scale.at(c, lanes)) : grad;
  };

  Sum x_sum, w_sum;
  for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
    x_sum.slot[slot] += load(x + c, lanes);
    w_sum.slot[slot] += gradient(c, lanes) * (plus + scale.at(c, lanes));
  });
  const bool rms = options && o.rms;  // then no mean is subtracted
  const Vec mean = rms ? Vec{} : splat(x_sum.total() / (float)n.C);

  Sum squares, products, centred_sum;
  for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
    Vec centred = keep(load(x + c, lanes) - mean, lanes);
    Vec w = gradient(c, lanes) * (plus + scale.at(c, lanes));
    squares.slot[slot] = fma(centred, centred, squares.slot[slot]);
    products.slot[slot] = fma(centred, w, products.slot[slot]);
    centred_sum.slot[slot] += centred;
  });
  const float sum = rms ? 0.0f : centred_sum.total(), missed = sum / (float)n.C, w_total = rms ? 0.0f : w_sum.total();
  const float inverse = inverse_deviation(squares.total(), sum, missed, n.C, n.eps);
  const Vec rest = splat(missed), rstd = splat(inverse);
  const Vec w_mean = splat(w_total / (float)n.C);
  const Vec wy_mean = splat((products.total() - missed * w_total) * inverse / (float)n.C);

  T* dx = row<T>(a.dx, b, l);
  const bool with_branch = options ? a.branch.data != nullptr : gated;
  const T* grad_x_new = with_branch ? row<T>(a.grad_x_new, b, l) : nullptr;
  const U* branch = with_branch ? row<U>(a.branch, b, l) : nullptr;
  U* dbranch = with_branch ? row<U>(a.dbranch, b, l) : nullptr;
  const bool gate_per_token = options && a.token_gate.data != nullptr;
  const Modulation<U, options> gate = gate_per_token ? Modulation<U, options>(a.token_gate, b, l, o)
                                                     : Modulation<U, options>(a.gate, b, o);
  const Modulation<U, options> shift(a.shift, b, o);
  for_each_output<options>(n.C, [&](int64_t c, auto lanes, int) MVAR_INLINE_LAMBDA {
    Vec grad = gradient(c, lanes);
    Vec y = ((load(x + c, lanes) - mean) - rest) * rstd;
    Vec factor = plus + scale.at(c, lanes);
    Vec w = grad * factor;
    Vec d = (w - w_mean - y * wy_mean) * rstd;
    if (per_token) {
      const Vec at_out = load(grad_out + c, lanes);
      store_gradient<U>(a.token_dscale, b, l, o, c, at_out * fma(y, factor, shift.at(c, lanes)), lanes);
      store_gradient<U>(a.token_dshift, b, l, o, c, at_out, lanes);
    }
    if (with_branch) {
      d += load(grad_x_new + c, lanes);
      store(dbranch + c, d * gate.at(c, lanes), lanes);
      if (gate_per_token) {
        store_gradient<U>(a.token_dgate, b, l, o, c, d * load(branch + c, lanes), lanes);
      } else {
        store(dgate + c, fma(d, load(branch + c, lanes), load(dgate + c, lanes)), lanes);
      }
    }
    store(dx + c, d, lanes);
    store(dscale + c, fma(grad, y, load(dscale + c, lanes)), lanes);
    store(dshift + c, grad + load(dshift + c, lanes), lanes);
  });
}

// out[c] = the sum, over a sample's blocks, of one of the workspace's sums
template <typename T>
void add_blocks(T* out, const float* sums, int64_t L, int64_t C) {
  for_each_vector(C, [&](int64_t c, auto lanes, int) MVAR_INLINE_LAMBDA {
    Vec total{};
    for (int64_t k = 0; k < blocks(L); ++k) total += load(sums + k * kSums * C + c, lanes);
    store(out + c, total, lanes);
  });
}

template <typename T, typename U, bool gated, bool options>
void backward(const AdalnBackward& a, AdalnSizes n, float* workspace) {
#pragma omp parallel if (n.B * n.L * n.C > kParallelElements)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n.B * blocks(n.L); ++i) {
      const int64_t b = i / blocks(n.L);
      const int64_t first = i % blocks(n.L) * kBlockRows;
      const int64_t last = first + kBlockRows < n.L ? first + kBlockRows : n.L;
      float* sums = workspace + i * kSums * n.C;
      __builtin_memset(sums, 0, kSums * n.C * sizeof(float));
      for (int64_t l = first; l < last; ++l) backward_row<T, U, gated, options>(a, n, b, l, sums);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n.B; ++b) {
      const float* sums = workspace + b * blocks(n.L) * kSums * n.C;
      const auto add = [&](const PerSample& out, const float* of_first) MVAR_INLINE_LAMBDA {
        if constexpr (options) add_blocks(row<float>(out, b), of_first, n.L, n.C);
        else add_blocks(row<U>(out, b), of_first, n.L, n.C);
      };
      add(a.dscale, sums);
      add(a.dshift, sums + n.C);
      if ((options || gated) && a.dgate.data != nullptr) add(a.dgate, sums + 2 * n.C);
    }
  }
}

template <typename T, typename U, bool gated, bool options>
constexpr AdalnPair kPair = {forward<T, U, gated, options>, backward<T, U, gated, options>};

}  // namespace

const AdalnKernels adaln = {
    {kPair<float, float, false, false>, kPair<bf16, bf16, false, false>},
    {kPair<float, float, true, false>, kPair<bf16, bf16, true, false>},
    {{kPair<float, float, true, true>, kPair<float, bf16, true, true>}, {{}, kPair<bf16, bf16, true, true>}},
    backward_workspace,
};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
