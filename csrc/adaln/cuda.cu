// adaLN in CUDA. The result, for row x of sample b (mvar_kernels/ops/adaln/reference.py):
//
//     x_new = x + gate·branch                            gated form; rounded to T, and that is what is normalised
//     out   = (x_new − mean) / deviation · (1 + scale) + shift
//
// A row lies in the registers of one group of lanes, a warp or a block, and is read and written once, 16 bytes at a
// time: rows start at multiples of 16 bytes and are as long. Lane i of a group of G holds the parts i, i + G, i + 2G …,
// so that neighbours access neighbouring memory:
//
//     row of C numbers   | 0 | 1 | 2 | … | G−1 | 0 | 1 | …        the lane that holds each part
//
// Forward, C ≤ 1024: a group is a warp, which needs no barrier; wider rows take a block. Backward: always a block,
// because each lane also holds the sums over rows of its columns, three times as many numbers as the row itself.
// The (B, C) gradients are summed in two stages, in an order that the sizes alone decide: a block adds up a slab of
// kSlabRows rows of a sample, and a second kernel adds the slabs. No atomics.
#include <type_traits>

#include "adaln/adaln.h"
#include "common/cuda/launch.h"
#include "common/cuda/numbers.h"
#include "common/cuda/reduce.h"

namespace mvar {
namespace cuda {
namespace {

constexpr int kSlabRows = 32;
constexpr int kSums = 3;  // of a slab: dscale, dshift, dgate

// Rows that a group works on, one after another, with the modulation kept in registers. One, where there are too few
// rows to fill a GPU otherwise.
int rows_per_group(const AdalnSizes& n) { return n.B * n.L >= 16384 ? 4 : 1; }

template <typename T>
__device__ T* row(const Tokens& t, int64_t b, int64_t l) {
  return (T*)t.data + b * t.batch_stride + l * t.row_stride;
}
template <typename T>
__device__ T* row(const PerSample& t, int64_t b) {
  return (T*)t.data + b * t.batch_stride;
}

// A lane's share of a row that kWarps warps hold together: kValues numbers in parts of kSize.
template <typename T, int kWarps, int kValues>
struct Layout {
  static constexpr int kSize = kPerAccess<T>;
  typedef Vector<T, kSize> Part;
  static constexpr int kParts = kValues / kSize;
  static constexpr int kLanes = kWarps * kWarpSize;

  // The first column of one of this lane's parts.
  static __device__ int column(int part) { return (part * kLanes + (int)threadIdx.x % kLanes) * kSize; }

  // Past the end of the row, zeros. (A row ends where a part does.)
  static __device__ Part load(const T* row, int part, int C) {
    const int c = column(part);
    if (c < C) return load_vector<kSize>(row + c);
    Part zeros;
    for (int i = 0; i < kSize; ++i) zeros.at[i] = from_float<T>(0.0f);
    return zeros;
  }

  static __device__ void store(T* row, int part, int C, const Part& values) {
    const int c = column(part);
    if (c < C) store_vector<kSize>(row + c, values);
  }
};

constexpr int kMaxSums = 3;

template <int kWarps>
struct Shared {
  float sums[2][kWarps][kMaxSums];
};

// Makes of each number its sum over a group, known to each of its lanes. `turn` counts the calls: two buffers take
// turns, so that one barrier a call is enough.
template <int kWarps, int n>
__device__ void sum_over_group(float (&v)[n], int& turn) {
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = warp_sum(v[i]);
  if constexpr (kWarps > 1) {
    float(*sums)[kMaxSums] = shared<Shared<kWarps>>().sums[turn++ % 2];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize][i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = sums[0][i];
      for (int warp = 1; warp < kWarps; ++warp) v[i] += sums[warp][i];
    }
  }
}

// Of the sums of x − mean and of its squares. The mean is rounded: what it missed, `rest`, is the mean of x − mean, no
// part of the variance, and all that a constant row has; 1/√eps would make 1 of it in a row of 12345.678.
__device__ float inverse_deviation(float squares, float sum, float rest, int64_t C, float eps) {
  return 1.0f / sqrtf(fmaxf(squares - sum * rest, 0.0f) / (float)C + eps);
}

template <int kRowWarps>
constexpr int kBlockWarps = kRowWarps > 4 ? kRowWarps : 4;

template <typename T, bool gated, int kWarps, int kValues>
__global__ void __launch_bounds__(kBlockWarps<kWarps> * kWarpSize)
    adaln_fwd_kernel(AdalnForward a, AdalnSizes n, int rows, int groups_per_sample) {
  typedef Layout<T, kWarps, kValues> Row;
  typedef typename Row::Part Part;
  constexpr int kSize = Row::kSize;
  const int64_t group = (int64_t)blockIdx.x * (kBlockWarps<kWarps> / kWarps) + threadIdx.x / Row::kLanes;
  const int64_t b = group / groups_per_sample;
  if (b >= n.B) return;
  const int C = (int)n.C;
  const int64_t first = group % groups_per_sample * rows;
  const int64_t last = first + rows < n.L ? first + rows : n.L;

  Part scale[Row::kParts], shift[Row::kParts], gate[gated ? Row::kParts : 1];
#pragma unroll
  for (int v = 0; v < Row::kParts; ++v) {
    scale[v] = Row::load(row<T>(a.scale, b), v, C);
    shift[v] = Row::load(row<T>(a.shift, b), v, C);
    if constexpr (gated) gate[v] = Row::load(row<T>(a.gate, b), v, C);
  }

  int turn = 0;
  for (int64_t l = first; l < last; ++l) {
    float x[kValues], total = 0.0f;
#pragma unroll
    for (int v = 0; v < Row::kParts; ++v) {
      Part values = Row::load(row<T>(a.x, b, l), v, C);
      if constexpr (gated) {
        const Part branch = Row::load(row<T>(a.branch, b, l), v, C);
        for (int i = 0; i < kSize; ++i) {
          values.at[i] = from_float<T>(fmaf(to_float(gate[v].at[i]), to_float(branch.at[i]), to_float(values.at[i])));
        }
        Row::store(row<T>(a.x_new, b, l), v, C, values);
      }
      for (int i = 0; i < kSize; ++i) total += x[v * kSize + i] = to_float(values.at[i]);
    }
    float totals[] = {total};
    sum_over_group<kWarps>(totals, turn);
    const float mean = totals[0] / (float)C;

    float moments[] = {0.0f, 0.0f};  // sums of x − mean and of its squares
#pragma unroll
    for (int v = 0; v < Row::kParts; ++v) {
      for (int i = 0; i < kSize; ++i) {
        float& value = x[v * kSize + i];
        value = Row::column(v) + i < C ? value - mean : 0.0f;
        moments[0] += value;
        moments[1] = fmaf(value, value, moments[1]);
      }
    }
    sum_over_group<kWarps>(moments, turn);
    const float rest = moments[0] / (float)C;
    const float rstd = inverse_deviation(moments[1], moments[0], rest, C, n.eps);

#pragma unroll
    for (int v = 0; v < Row::kParts; ++v) {
      Part out;
      for (int i = 0; i < kSize; ++i) {
        const float factor = 1.0f + to_float(scale[v].at[i]);
        out.at[i] = from_float<T>(fmaf((x[v * kSize + i] - rest) * rstd, factor, to_float(shift[v].at[i])));
      }
      Row::store(row<T>(a.out, b, l), v, C, out);
    }
  }
}

// With w = grad_out·(1+scale) and y the normalised row, dx = (w − mean(w) − y·mean(w·y)) / deviation, and the gated form
// adds grad_x_new. partials: (B, slabs, kSums, C).
template <typename T, bool gated, int kWarps>
__global__ void __launch_bounds__(kWarps * kWarpSize, 1)
    adaln_bwd_kernel(AdalnBackward a, AdalnSizes n, float* partials) {
  constexpr int kValues = 8;
  typedef Layout<T, kWarps, kValues> Row;
  typedef typename Row::Part Part;
  constexpr int kSize = Row::kSize;
  const int C = (int)n.C;
  const int64_t b = blockIdx.y, first = (int64_t)blockIdx.x * kSlabRows;
  const int64_t last = first + kSlabRows < n.L ? first + kSlabRows : n.L;
  float dscale[kValues] = {}, dshift[kValues] = {}, dgate[gated ? kValues : 1] = {};

  int turn = 0;
  for (int64_t l = first; l < last; ++l) {
    float y[kValues], w[kValues], sums[] = {0.0f, 0.0f};  // of x and w
#pragma unroll
    for (int v = 0; v < Row::kParts; ++v) {
      const Part x = Row::load(row<T>(a.x, b, l), v, C);
      const Part grad = Row::load(row<T>(a.grad_out, b, l), v, C);
      const Part scale = Row::load(row<T>(a.scale, b), v, C);
      for (int i = 0; i < kSize; ++i) {
        const int j = v * kSize + i;
        sums[0] += y[j] = to_float(x.at[i]);
        dshift[j] += to_float(grad.at[i]);
        sums[1] += w[j] = to_float(grad.at[i]) * (1.0f + to_float(scale.at[i]));
      }
    }
    sum_over_group<kWarps>(sums, turn);
    const float mean = sums[0] / (float)C, w_mean = sums[1] / (float)C;

    float moments[] = {0.0f, 0.0f, 0.0f};  // sums of x − mean, of its squares, and of its products with w
#pragma unroll
    for (int v = 0; v < Row::kParts; ++v) {
      for (int i = 0; i < kSize; ++i) {
        const int j = v * kSize + i;
        y[j] = Row::column(v) + i < C ? y[j] - mean : 0.0f;
        moments[0] += y[j];
        moments[1] = fmaf(y[j], y[j], moments[1]);
        moments[2] = fmaf(y[j], w[j], moments[2]);
      }
    }
    sum_over_group<kWarps>(moments, turn);
    const float rest = moments[0] / (float)C;
    const float rstd = inverse_deviation(moments[1], moments[0], rest, C, n.eps);
    const float wy_mean = (moments[2] - rest * sums[1]) * rstd / (float)C;

#pragma unroll
    for (int v = 0; v < Row::kParts; ++v) {
      const Part grad = Row::load(row<T>(a.grad_out, b, l), v, C);
      Part dx, dbranch, grad_x_new, branch, gate;
      if constexpr (gated) {
        grad_x_new = Row::load(row<T>(a.grad_x_new, b, l), v, C);
        branch = Row::load(row<T>(a.branch, b, l), v, C);
        gate = Row::load(row<T>(a.gate, b), v, C);
      }
      for (int i = 0; i < kSize; ++i) {
        const int j = v * kSize + i;
        const float normal = (y[j] - rest) * rstd;
        float d = (w[j] - w_mean - normal * wy_mean) * rstd;
        dscale[j] = fmaf(to_float(grad.at[i]), normal, dscale[j]);
        if constexpr (gated) {
          d += to_float(grad_x_new.at[i]);
          dbranch.at[i] = from_float<T>(d * to_float(gate.at[i]));
          dgate[j] = fmaf(d, to_float(branch.at[i]), dgate[j]);
        }
        dx.at[i] = from_float<T>(d);
      }
      Row::store(row<T>(a.dx, b, l), v, C, dx);
      if constexpr (gated) Row::store(row<T>(a.dbranch, b, l), v, C, dbranch);
    }
  }

  float* sums = partials + (b * gridDim.x + blockIdx.x) * kSums * n.C;
#pragma unroll
  for (int v = 0; v < Row::kParts; ++v) {
    for (int i = 0; i < kSize; ++i) {
      const int j = v * kSize + i, c = Row::column(v) + i;
      if (c >= C) continue;
      sums[c] = dscale[j];
      sums[C + c] = dshift[j];
      if constexpr (gated) sums[2 * C + c] = dgate[j];
    }
  }
}

constexpr int kSumsBlock = 128;

// The sums of a sample's slabs, in order. blockIdx.z: which of the three.
template <typename T>
__global__ void __launch_bounds__(kSumsBlock)
    adaln_bwd_sums_kernel(AdalnBackward a, AdalnSizes n, const float* partials, int64_t slabs) {
  const int64_t c = (int64_t)blockIdx.x * kSumsBlock + threadIdx.x, b = blockIdx.y;
  if (c >= n.C) return;
  const float* sums = partials + (b * slabs * kSums + blockIdx.z) * n.C + c;
  float total = 0.0f;
  for (int64_t slab = 0; slab < slabs; ++slab) total += sums[slab * kSums * n.C];
  const PerSample& out = blockIdx.z == 0 ? a.dscale : blockIdx.z == 1 ? a.dshift : a.dgate;
  row<T>(out, b)[c] = from_float<T>(total);
}

int64_t slabs_of(const AdalnSizes& n) { return (n.L + kSlabRows - 1) / kSlabRows; }

int64_t backward_workspace(AdalnSizes n) { return n.B * slabs_of(n) * kSums * n.C; }

template <int n>
using Number = std::integral_constant<int, n>;

template <typename T, bool gated>
void forward(const AdalnForward& a, AdalnSizes n) {
  const int rows = rows_per_group(n), groups = (int)((n.L + rows - 1) / rows);
  const auto start = [&](auto warps, auto values) {
    const int64_t per_block = kBlockWarps<warps> / warps, blocks = (n.B * groups + per_block - 1) / per_block;
    launch(adaln_fwd_kernel<T, gated, warps, values>, dim3((unsigned)blocks), kBlockWarps<warps> * kWarpSize,
           sizeof(Shared<warps>), n.stream, a, n, rows, groups);
  };
  if (n.C <= 1024) return start(Number<1>{}, Number<32>{});
  if (n.C <= 2048) return start(Number<4>{}, Number<16>{});
  start(Number<8>{}, Number<16>{});
}

template <typename T, bool gated>
void backward(const AdalnBackward& a, AdalnSizes n, float* workspace) {
  const int64_t slabs = slabs_of(n);
  const auto start = [&](auto warps) {
    launch(adaln_bwd_kernel<T, gated, warps>, dim3((unsigned)slabs, (unsigned)n.B), warps * kWarpSize,
           sizeof(Shared<warps>), n.stream, a, n, workspace);
  };
  if (n.C <= 1024) {
    start(Number<4>{});
  } else if (n.C <= 2048) {
    start(Number<8>{});
  } else {
    start(Number<16>{});
  }
  const dim3 grid((unsigned)((n.C + kSumsBlock - 1) / kSumsBlock), (unsigned)n.B, gated ? 3 : 2);
  launch(adaln_bwd_sums_kernel<T>, grid, kSumsBlock, 0, n.stream, a, n, (const float*)workspace, slabs);
}

}  // namespace

const AdalnKernels adaln = {
    {{forward<float, false>, backward<float, false>},
     {forward<bf16, false>, backward<bf16, false>},
     {forward<f16, false>, backward<f16, false>}},
    {{forward<float, true>, backward<float, true>},
     {forward<bf16, true>, backward<bf16, true>},
     {forward<f16, true>, backward<f16, true>}},
    {},
    backward_workspace,
};

}  // namespace cuda
}  // namespace mvar
