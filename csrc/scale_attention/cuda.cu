// Scale attention in CUDA, forward: FlashAttention over the tiles of mvar_kernels/ops/scale_attention/plan.py. The
// result for query i, which sees the keys [lo_i, hi_i) of its head (mvar_kernels/ops/scale_attention/reference.py):
//
//     s_ij = c_i · (q_i·k_j) / ‖k_j‖     c_i: the scale · exp(min(τ, log 100)) / ‖q_i‖; without τ no norms
//     out_i = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij),   lse_i = log Σ_j exp(s_ij)
//
// A block of 4 warps takes one tile, at most 64 queries of one head, and goes through its keys, 64 at a time. Each warp
// has 16 queries, the rows of a matmul on tensor cores (m16n8k16); the warps share keys and values alone:
//
//                 64 keys
//          ┌────────────────────┐      the tile's keys, a block after the other (plan.tiles):
//   warp 0 │ 16 queries         │
//          ├────────────────────┤      lo             full_hi       hi
//        1 │ s: 16 × 64, in     │       ├────┬────┬────┼────┬────┬──┤
//          ├────────────────────┤       every row sees  row i sees
//        2 │ registers, as are  │       all of them     [lo_i, hi_i): a mask, from plan.spans
//          ├────────────────────┤
//        3 │ q and a: 16 × D    │
//          └────────────────────┘
//
// Of each row a warp keeps the largest score so far m, the sum of weights l and of weights times values a, in float32:
//
//     m' = max(m, max s),   p = 2^(c (s − m')),   l' = l·2^(c (m − m')) + Σ p,   a' = a·2^(c (m − m')) + p v
//
// with log2 e in c. The accumulators of s = q kᵀ have the very layout that p needs as left operand of p v. q and k go
// to the tensor cores as they came; c and 1/‖k‖ stay outside of the matmul, in float32, which a score of 100 needs.
//
// While one block of keys is worked on, the next one is copied to the other of two buffers; one barrier a block of keys
// both publishes the new buffer and says that the old one is no longer read:
//
//     wait for my copies of block j · norms of the keys I copied · barrier · start to copy block j + 1 · use block j
//
// Rows in shared memory are 8 or 16 parts of 16 bytes; part p of row r lies at place p ^ (r % 8), so that the 8 rows
// that one ldmatrix reads at the same part, and the parts of one row that a copy writes, lie in different banks:
//
//     place   0  1  2  3  4  5  6  7
//     row 0   0  1  2  3  4  5  6  7
//     row 1   1  0  3  2  5  4  7  6        the part that lies there
//     row 2   2  3  0  1  6  7  4  5
//     row 3   3  2  1  0  7  6  5  4
//     …
//
// Predicted, not yet measured. mma.sync is what sm_80, 90 and 100 have in common. A warp reads a block of keys and
// values, 16 KB at D = 64, for 2^17 multiply-adds, and shared memory gives a multiprocessor 128 bytes a clock: at most
// 1024 multiply-adds a clock, all of sm_80's tensor cores but half of sm_90's, whose wgmma would read once for 4 warps.
// FlashAttention-2, also made of mma.sync, is reported at 35 % of an H100's peak (arXiv 2407.08608), about 345 TFLOP/s.
// H200 (4.3 TB/s, 790 TFLOP/s measured), bf16, 16 heads of 64, every tensor moved once, pairs of the pattern alone:
//
//                                                  MB     GFLOP    bound    at 345 TFLOP/s    expected
//     256 tokens of scale 10, 16 rows (8 images)   33.6     4.3     8 µs         12 µs        15–20 µs
//     the same, 128 rows (64 images)                268    34.4    62 µs        100 µs      105–130 µs
//     all 680 tokens, 32 samples                    178    14.5    41 µs         50 µs*      55–75 µs
//
// * 0.84 of the tiles' area is pairs. Lower bounds are of memory. Small scales are a launch and one trip to memory: 3–5 µs.
#include "common/cuda/launch.h"
#include "common/cuda/numbers.h"
#include "common/cuda/reduce.h"
#include "common/cuda/tensor_core.h"
#include "scale_attention/scale_attention.h"

namespace mvar {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlock = kWarps * kWarpSize;
constexpr int kRows = 16;              // queries of a warp
constexpr int kTile = kWarps * kRows;  // queries of a tile, and keys of a block of them
constexpr int kPart = 8;               // numbers in 16 bytes; and columns of a matmul
constexpr int kTileEntries = 6;        // of plan.tiles: row, rows, lo, full_lo, full_hi, hi
// Blocks on a multiprocessor, as many as sm_80's shared memory has room for: registers for them and no more.
constexpr int blocks_at_once(int D) { return D == 64 ? 3 : 2; }

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMaxLogTemperature = 4.605170185988092f;  // log 100
constexpr float kMinSquare = 1e-24f;                      // of a norm of 1e-12
constexpr float kMinFactor = 1e-37f;                      // on scores: −∞ · 0 is not a number
constexpr float kLowest = -1e30f;                         // below every score, and finite: nor is −∞ − −∞

// kTile rows of a head in shared memory.
template <typename T, int kD>
struct Tile {
  static constexpr int kParts = kD / kPart;
  static constexpr int kRowsAtOnce = kBlock / kParts;  // that the block's threads copy together
  Vector<T, kPart> parts[kTile][kParts];

  __device__ Vector<T, kPart>& at(int row, int part) { return parts[row][part ^ (row & 7)]; }

  // What this lane names for ldmatrix to read 16 rows of 2 parts: matrix 0 is the upper left one, 1 the lower left one,
  // 2 the upper right one, 3 the lower right one.
  __device__ const void* square(int row, int part) {
    const int lane = threadIdx.x % kWarpSize;
    return &at(row + lane % 16, part + lane / 16);
  }

  // What this thread copies: one part of every kRowsAtOnce-th row.
  static __device__ int own_part() { return (int)(threadIdx.x % kParts); }
  static __device__ int own_row(int i) { return (int)(threadIdx.x / kParts) + i * kRowsAtOnce; }

  // Starts to copy the rows from `first` on; from `last` on they are 0.
  __device__ void copy(const T* head, int64_t row_stride, int first, int last) {
#pragma unroll
    for (int i = 0; i < kTile / kRowsAtOnce; ++i) {
      const bool there = first + own_row(i) < last;
      const T* row = head + (there ? first + own_row(i) : 0) * row_stride;
      copy_async(&at(own_row(i), own_part()), row + own_part() * kPart, there ? 16 : 0);
    }
  }

  // 1/max(‖row‖, eps) of each row, by those that copied it: their own copies they see without a barrier.
  __device__ void inverse_norms(float* norms) {
#pragma unroll
    for (int i = 0; i < kTile / kRowsAtOnce; ++i) {
      const Vector<T, kPart> part = at(own_row(i), own_part());
      float squares = 0.0f;
      for (int j = 0; j < kPart; ++j) squares = fmaf(to_float(part.at[j]), to_float(part.at[j]), squares);
      for (int distance = kParts / 2; distance > 0; distance /= 2) {
        squares += __shfl_xor_sync(kWholeWarp, squares, distance);
      }
      if (own_part() == 0) norms[own_row(i)] = rsqrtf(fmaxf(squares, kMinSquare));
    }
  }
};

template <typename T, int kD>
struct Shared {
  Tile<T, kD> q;  // at the end, the output
  Tile<T, kD> k[2], v[2];
  float k_norms[2][kTile];           // inverse
  int key_lo[kTile], key_hi[kTile];  // the keys that each query sees
};

// Over the 4 lanes that hold one row of an accumulator.
__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}
__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

// What a warp holds of its 16 rows: lane 4·g + t of rows g ("half" 0) and g + 8 ("half" 1) the columns 2t and 2t + 1 of
// every eight, as x[columns / 8][2·half, 2·half + 1].
template <typename T, int kD, bool normed>
struct Rows {
  typedef Tile<T, kD> Head;
  static constexpr int kProducts = kTile / kPart;  // across the keys of a block

  uint32_t q[kD / 16][4];  // left operands
  float factor[2];         // c of each row, times log2 e
  float sums[kD / kPart][4] = {};                     // a
  float peak[2] = {kLowest, kLowest}, total[2] = {};  // m and l, of which each lane has a part

  // The warp's queries, and c from them.
  __device__ void load(Head& queries, int first_row, float score_factor) {
    float squares[2] = {};
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      load_matrices(q[d], queries.square(first_row, 2 * d));
      for (int i = 0; normed && i < 4; ++i) {
        const float2 pair = unpack<T>(q[d][i]);
        squares[i % 2] += pair.x * pair.x + pair.y * pair.y;
      }
    }
    for (int half = 0; half < 2; ++half) {
      factor[half] = score_factor * kLog2E;
      if constexpr (normed) factor[half] *= rsqrtf(fmaxf(quad_sum(squares[half]), kMinSquare));
      factor[half] = fmaxf(factor[half], kMinFactor);
    }
  }

  // s = q kᵀ / ‖k‖: k's rows are the columns of the right operand.
  __device__ void scores(float (&s)[kProducts][4], Head& keys, const float* norms) {
#pragma unroll
    for (int n = 0; n < kProducts; n += 2) {
#pragma unroll
      for (int d = 0; d < kD / 16; ++d) {
        uint32_t k[4];
        load_matrices(k, keys.square(kPart * n, 2 * d));
        multiply<T>(s[n], q[d], {k[0], k[2]});
        multiply<T>(s[n + 1], q[d], {k[1], k[3]});
      }
      for (int m = n; normed && m < n + 2; ++m) {
        for (int i = 0; i < 4; ++i) s[m][i] *= norms[kPart * m + threadIdx.x % 4 * 2 + i % 2];
      }
    }
  }

  // Keys that a row does not see: −∞. `start`: the first key of the block; lo, hi: the keys that the warp's rows see.
  static __device__ void mask(float (&s)[kProducts][4], int start, const int* lo, const int* hi) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = lo[lane / 4 + 8 * half] - start, last = hi[lane / 4 + 8 * half] - start;
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        for (int j = 0; j < 2; ++j) {
          const int key = kPart * n + lane % 4 * 2 + j;
          if (key < first || key >= last) s[n][2 * half + j] = -INFINITY;
        }
      }
    }
  }

  // Scores become weights, relative to the new peak, to which all sums so far are brought, too. The difference comes
  // before the factor: of scores of 1e10 the product's rounding alone is hundreds, and would make exponents positive.
  __device__ void online_softmax(float (&s)[kProducts][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
      for (int n = 1; n < kProducts; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      const float new_peak = fmaxf(peak[half], quad_max(highest));
      const float shrink = exp2_approximate((peak[half] - new_peak) * factor[half]);
      peak[half] = new_peak;
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_approximate((s[n][i] - new_peak) * factor[half]);
          total[half] += s[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kD / kPart; ++n) {
        for (int i = 2 * half; i < 2 * half + 2; ++i) sums[n][i] *= shrink;
      }
    }
  }

  // sums += p v
  __device__ void add(const float (&p)[kProducts][4], Head& values) {
#pragma unroll
    for (int n = 0; n < kProducts; n += 2) {
      const uint32_t weights[4] = {pack<T>(p[n][0], p[n][1]), pack<T>(p[n][2], p[n][3]),
                                   pack<T>(p[n + 1][0], p[n + 1][1]), pack<T>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
      for (int d = 0; d < kD / kPart; d += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, values.square(kPart * n, d));
        multiply<T>(sums[d], weights, {v[0], v[1]});
        multiply<T>(sums[d + 1], weights, {v[2], v[3]});
      }
    }
  }
};

template <typename T, int kD, bool normed>
__global__ void __launch_bounds__(kBlock, blocks_at_once(kD))
    scale_attention_fwd_kernel(ScaleAttentionForward a, ScaleAttentionSizes n) {
  typedef Tile<T, kD> Head;
  auto& memory = shared<Shared<T, kD>>();
  const int* tile = n.tiles + kTileEntries * blockIdx.x;
  const int row = tile[0], rows = tile[1], lo = tile[2], full_hi = tile[4], hi = tile[5];
  const int64_t h = blockIdx.y, b = blockIdx.z;
  const auto head = [&](const Heads& t) { return (T*)t.data + b * t.batch_stride + h * t.head_stride; };
  const int warp = (int)threadIdx.x / kWarpSize, lane = (int)threadIdx.x % kWarpSize;
  const int g = lane / 4, first = kRows * warp;
  const bool idle = first >= rows;  // no queries for this warp, which then only helps to copy

  const auto copy_keys = [&](int start, int buffer) {
    memory.k[buffer].copy(head(a.k), a.k.row_stride, start, hi);
    memory.v[buffer].copy(head(a.v), a.v.row_stride, start, hi);
    commit_copies();
  };
  memory.q.copy(head(a.q), a.q.row_stride, row, row + rows);
  commit_copies();
  copy_keys(lo, 0);

  if (const int i = (int)threadIdx.x; i < kTile) {
    memory.key_lo[i] = i < rows ? n.spans[row + i] : 0;
    memory.key_hi[i] = i < rows ? n.spans[n.Lq + row + i] : 0;
  }

  Rows<T, kD, normed> mine;
  float score_factor = n.scale;
  if constexpr (normed) score_factor *= expf(fminf(n.log_temperature[h], kMaxLogTemperature));
  wait_for_copies<1>();
  __syncthreads();
  mine.load(memory.q, first, score_factor);

  for (int start = lo, buffer = 0; start < hi; start += kTile, buffer ^= 1) {
    wait_for_copies<0>();
    if constexpr (normed) memory.k[buffer].inverse_norms(memory.k_norms[buffer]);
    __syncthreads();
    if (start + kTile < hi) copy_keys(start + kTile, buffer ^ 1);
    if (idle) continue;

    float s[kTile / kPart][4] = {};
    mine.scores(s, memory.k[buffer], memory.k_norms[buffer]);
    if (start >= full_hi) mine.mask(s, start, memory.key_lo + first, memory.key_hi + first);
    mine.online_softmax(s);
    mine.add(s, memory.v[buffer]);
  }
  if (idle) return;

  // Through the warp's rows of q's tile, to be written 16 bytes at a time.
  for (int half = 0; half < 2; ++half) {
    const int i = first + g + 8 * half;
    const float total = quad_sum(mine.total[half]), inverse = 1.0f / total;
#pragma unroll
    for (int d = 0; d < Head::kParts; ++d) {
      const uint32_t pair = pack<T>(mine.sums[d][2 * half] * inverse, mine.sums[d][2 * half + 1] * inverse);
      memcpy(memory.q.at(i, d).at + lane % 4 * 2, &pair, 4);
    }
    if (lane % 4 == 0 && i < rows) {
      a.lse[(b * n.H + h) * n.Lq + row + i] = (mine.peak[half] * mine.factor[half] + log2f(total)) * kLn2;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kRows * Head::kParts; i += kWarpSize) {
    const int r = first + i / Head::kParts, part = i % Head::kParts;
    if (r < rows) store_vector<kPart>(head(a.out) + (row + r) * a.out.row_stride + part * kPart, memory.q.at(r, part));
  }
}

template <typename T, int kD>
void start(const ScaleAttentionForward& a, const ScaleAttentionSizes& n) {
  const bool normed = n.log_temperature != nullptr;
  const auto kernel = normed ? scale_attention_fwd_kernel<T, kD, true> : scale_attention_fwd_kernel<T, kD, false>;
  const dim3 grid((unsigned)n.tile_count, (unsigned)n.H, (unsigned)n.B);
  launch(kernel, grid, kBlock, sizeof(Shared<T, kD>), n.stream, a, n);
}

template <typename T>
void forward(const ScaleAttentionForward& a, const ScaleAttentionSizes& n, float*) {
  if (n.D == 64) {
    start<T, 64>(a, n);
  } else {
    start<T, 128>(a, n);
  }
}

int64_t forward_workspace(const ScaleAttentionSizes&) { return 0; }

}  // namespace

const ScaleAttentionKernels scale_attention = {{
    {},
    {forward<bf16>, forward_workspace, nullptr, nullptr},
    {forward<f16>, forward_workspace, nullptr, nullptr},
}};

}  // namespace cuda
}  // namespace mvar
