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

// Of the sums of x − mean and of its squares; what the mean missed, `rest`, is no part of the variance.
MVAR_INLINE float inverse_deviation(float squares, float sum, float rest, int64_t C, float eps) {
  const float missed = sum * rest;
  return 1.0f / __builtin_sqrtf((squares > missed ? squares - missed : 0.0f) / (float)C + eps);
}

// In bfloat16 four rows at a time share the loads and conversions of the modulation: three quarters of the time of
// one row at a time (Zen 5, C = 1024, in the L3 cache). In float32 rows are pages of 4 KB, and as many of them at once
// as two rows have fall on the same lines of the first-level cache: a half more time, gated.
template <typename T>
constexpr int kRows = sizeof(T) == 2 ? 4 : 1;

// The hardware prefetches within a page: the next rows are prefetched by hand while these are computed (float32: 85 % of
// the time). Outputs are not: if their pages are new, prefetching took five times as long as writing them.

template <typename T, bool gated, int rows>
void forward_rows(const AdalnForward& a, const AdalnSizes& n, int64_t b, int64_t l) {
  const T* scale = row<T>(a.scale, b);
  const T* shift = row<T>(a.shift, b);
  const T* x[rows];
  const T* x_after[rows];
  T* out[rows];
  for (int r = 0; r < rows; ++r) {
    x[r] = row<T>(a.x, b, l + r);
    x_after[r] = x[r] + rows * a.x.row_stride;
    out[r] = row<T>(a.out, b, l + r);
  }

  Sum total[rows];
  if constexpr (gated) {
    const T* gate = row<T>(a.gate, b);
    const T* branch[rows];
    T* x_new[rows];
    for (int r = 0; r < rows; ++r) {
      branch[r] = row<T>(a.branch, b, l + r);
      x_new[r] = row<T>(a.x_new, b, l + r);
    }
    for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
      const Vec g = load(gate + c, lanes);
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
  for (int r = 0; r < rows; ++r) mean[r] = splat(total[r].total() / (float)n.C);

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
    const float sum = centred_sum[r].total(), missed = sum / (float)n.C;
    rest[r] = splat(missed);
    rstd[r] = splat(inverse_deviation(squares[r].total(), sum, missed, n.C, n.eps));
  }

  for_each_vector(n.C, [&](int64_t c, auto lanes, int) MVAR_INLINE_LAMBDA {
    const Vec factor = 1.0f + load(scale + c, lanes);
    const Vec offset = load(shift + c, lanes);
    for (int r = 0; r < rows; ++r) {
      Vec normal = ((load(x[r] + c, lanes) - mean[r]) - rest[r]) * rstd[r];
      store(out[r] + c, fma(normal, factor, offset), lanes);
    }
  });
}

template <typename T, bool gated>
void forward(const AdalnForward& a, AdalnSizes n) {
  constexpr int rows = kRows<T>;
  const int64_t groups = (n.L + rows - 1) / rows;
#pragma omp parallel for schedule(static) if (n.B * n.L * n.C > kParallelElements)
  for (int64_t i = 0; i < n.B * groups; ++i) {
    const int64_t b = i / groups, first = i % groups * rows;
    if (first + rows <= n.L) {
      forward_rows<T, gated, rows>(a, n, b, first);
    } else {
      for (int64_t l = first; l < n.L; ++l) forward_rows<T, gated, 1>(a, n, b, l);
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

// With w = grad_out·(1+scale) and y the normalised row, dx = (w − mean(w) − y·mean(w·y)) / deviation.
template <typename T, bool gated>
void backward_row(const AdalnBackward& a, const AdalnSizes& n, int64_t b, int64_t l, float* sums) {
  const T* x = row<T>(a.x, b, l);
  const T* grad_out = row<T>(a.grad_out, b, l);
  const T* scale = row<T>(a.scale, b);
  float* dscale = sums;
  float* dshift = sums + n.C;
  float* dgate = sums + 2 * n.C;

  Sum x_sum, w_sum;
  for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
    x_sum.slot[slot] += load(x + c, lanes);
    w_sum.slot[slot] += load(grad_out + c, lanes) * (1.0f + load(scale + c, lanes));
  });
  const Vec mean = splat(x_sum.total() / (float)n.C);

  Sum squares, products, centred_sum;
  for_each_vector(n.C, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
    Vec centred = keep(load(x + c, lanes) - mean, lanes);
    Vec w = load(grad_out + c, lanes) * (1.0f + load(scale + c, lanes));
    squares.slot[slot] = fma(centred, centred, squares.slot[slot]);
    products.slot[slot] = fma(centred, w, products.slot[slot]);
    centred_sum.slot[slot] += centred;
  });
  const float sum = centred_sum.total(), missed = sum / (float)n.C, w_total = w_sum.total();
  const float inverse = inverse_deviation(squares.total(), sum, missed, n.C, n.eps);
  const Vec rest = splat(missed), rstd = splat(inverse);
  const Vec w_mean = splat(w_total / (float)n.C);
  const Vec wy_mean = splat((products.total() - missed * w_total) * inverse / (float)n.C);

  T* dx = row<T>(a.dx, b, l);
  const T* grad_x_new = gated ? row<T>(a.grad_x_new, b, l) : nullptr;
  const T* branch = gated ? row<T>(a.branch, b, l) : nullptr;
  const T* gate = gated ? row<T>(a.gate, b) : nullptr;
  T* dbranch = gated ? row<T>(a.dbranch, b, l) : nullptr;
  for_each_vector(n.C, [&](int64_t c, auto lanes, int) MVAR_INLINE_LAMBDA {
    Vec grad = load(grad_out + c, lanes);
    Vec y = ((load(x + c, lanes) - mean) - rest) * rstd;
    Vec w = grad * (1.0f + load(scale + c, lanes));
    Vec d = (w - w_mean - y * wy_mean) * rstd;
    if constexpr (gated) {
      d += load(grad_x_new + c, lanes);
      store(dbranch + c, d * load(gate + c, lanes), lanes);
      store(dgate + c, fma(d, load(branch + c, lanes), load(dgate + c, lanes)), lanes);
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

template <typename T, bool gated>
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
      for (int64_t l = first; l < last; ++l) backward_row<T, gated>(a, n, b, l, sums);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n.B; ++b) {
      const float* sums = workspace + b * blocks(n.L) * kSums * n.C;
      add_blocks(row<T>(a.dscale, b), sums, n.L, n.C);
      add_blocks(row<T>(a.dshift, b), sums + n.C, n.L, n.C);
      if constexpr (gated) add_blocks(row<T>(a.dgate, b), sums + 2 * n.C, n.L, n.C);
    }
  }
}

}  // namespace

const AdalnKernels adaln = {
    {{forward<float, false>, backward<float, false>}, {forward<bf16, false>, backward<bf16, false>}},
    {{forward<float, true>, backward<float, true>}, {forward<bf16, true>, backward<bf16, true>}},
    backward_workspace,
};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
