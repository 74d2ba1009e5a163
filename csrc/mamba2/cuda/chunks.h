// More than kShort tokens: chunks of kChunk = 32, as small matmuls on the tensor cores.
//
// With S the prefix sums of log decays in a chunk and W[t, s] = exp(S_t − S_s) Δ_s for s < t, else 0:
//
//     y_t = ((C Bᵀ ⊙ W) x)_t + exp(S_t) h C_t + (D + Δ_t C_t·B_t) x_t
//     h   ← exp(S_end) h + (x ⊙ Δ exp(S_end − S))ᵀ B
//
// One block owns a head of a sample and walks its chunks; h (64 p × 64 n, float32) stays in the registers of its four
// warps. y is made transposed, so that h, an accumulator, is also the left operand of its matmul:
//
//         h                Cᵀ               xᵀ              (C Bᵀ ⊙ W)ᵀ             yᵀ
//     n 0    …   63    t 0 … 31         s 0 … 31           t 0 … 31              t 0 … 31
//    +------------+    +-------+       +-------+          +-------+             +-------+
//    | warp 0     |    |       |       | p 0–15|       s  |\ 0,0 ¦| 2: s 0–15  | p 0–15|
//    | warp 1     |  · |  n    |   +   | 16–31 |   ·      | \    ¦|    t 16–31 | 16–31 |
//    | warp 2     |    |       |       | 32–47 |          |- - - -| 1: nothing | 32–47 |
//    | warp 3     |    |       |       | 48–63 |          | 0   \¦| 3: s 16–31 | 48–63 |
//    +------------+    +-------+       +-------+          +-------+    t 16–31  +-------+
//
// Each warp makes one 16 × 16 square of the scores for all, then its own 16 rows of y and of h.
//
// Precision: the operands of the three matmuls that give y are rounded (kOperandParts) and summed in float32. A
// token's own term stays in float32, together with the skip: where Δ is large they are all there is to y, a factor
// common to a head's channels, which RMSNorm scales up again where it nearly cancels. h is an output in float32 and
// lives for the sequence: both operands of its matmul are three bf16 numbers each (split), and of the nine products the
// six above 2⁻²⁴ are summed, the small ones first, and added to the decayed h outside the tensor cores, whose
// accumulators truncate.
//
// What heads share is prepared once: of a token kArrays rows of 64 numbers (128 bytes): C, and B in three parts. Were
// each head to redo it, two thirds of its convolution and SiLU would be this.
//
// Operations of a token and head, in multiply-adds: scores 32·64·¾, their matmul with x 32·64·¾, h C 4,096, the
// update 6 · 4,096: 32 k, 64 kFLOP; in float16, of parts, 46 k. Bytes: x and z 256, y · SiLU(z) 128 written (read and
// written again by the norm); from the L2 cache 512 of what is prepared.
//
// Triton's kernel takes 64 tokens at a time: there four warps multiply 64 × 64 squares together (wgmma, sm_90 alone).
// Here each warp multiplies by itself (mma.sync, from sm_80 on, one source for all), and the scores of 64 tokens would
// double the work of their matmuls, which 32 tokens keep at a fifth of all.
#pragma once

#include "mamba2/cuda/common.h"

namespace mvar {
namespace cuda {
namespace {

constexpr int kChunk = 32;                 // a lane a token
constexpr int kShare = kChunk / kWarps;    // the tokens whose convolution and gate are one warp's
constexpr int kPitch = kN + 8;             // rows of 144 bytes: ldmatrix then accesses every bank once
constexpr int kScoresPitch = kChunk + 8;   // likewise
constexpr int kYPitch = kP + 4;            // columns of yᵀ, two apart, 8 banks apart

// An operand of the matmuls that give y is a sum of so many bf16 numbers: of one with bfloat16 inputs; with float16
// of two, 16 bits where float16 has 11, in float32's range: C·B, h and x after its convolution leave float16's where y
// fits.
template <typename T>
constexpr int kOperandParts = std::is_same_v<T, bf16> ? 1 : 2;

// Rows of what is prepared for a token: C's parts, then B's three, of which y takes the first kOperandParts.
constexpr int kC = 0;
template <typename T>
constexpr int kB = kOperandParts<T>;
template <typename T>
constexpr int kArrays = kB<T> + kParts;

template <typename T>
struct ChunkShared {
  uint16_t prepared[2][kArrays<T>][kChunk][kPitch];  // of this chunk and the next
  bf16 x[kOperandParts<T>][kChunk][kPitch];
  bf16 weighted[kParts][kChunk][kPitch];                // x ⊙ Δ exp(S_end − S)
  bf16 scores[kOperandParts<T>][kChunk][kScoresPitch];  // C Bᵀ ⊙ W
  float y[kChunk][kYPitch];                             // first a token's own term and the skip, then all of y
};

// One warp a token.
template <typename T>
__global__ void __launch_bounds__(kBlock) mamba2_mixer_fwd_prepare_kernel(MixerForward a, Sizes n, Scratch scratch) {
  const int lane = lane_index();
  const int64_t token = (int64_t)blockIdx.x * kWarps + warp_index();
  if (token >= n.B * n.L) return;
  const Rows<T> rows(a, n, token / n.L);
  const int l = (int)(token % n.L), channel = (int)n.H * kP + 2 * lane;
  const float2 B = Convolution(a, channel).at(rows, l, channel);
  const float2 C = Convolution(a, channel + kN).at(rows, l, channel + kN);
  uint32_t parts_of_B[kParts], parts_of_C[kOperandParts<T>];
  split(B, parts_of_B);
  split(C, parts_of_C);
  uint32_t* out = (uint32_t*)scratch.prepared + token * (kArrays<T> * kN / 2) + lane;
  const auto write = [&](int array, uint32_t packed) { out[array * kN / 2] = packed; };
  for (int i = 0; i < kOperandParts<T>; ++i) write(kC + i, parts_of_C[i]);
  for (int i = 0; i < kParts; ++i) write(kB<T> + i, parts_of_B[i]);
  const float product = warp_sum(fmaf(B.x, C.x, B.y * C.y));
  if (lane == 0) scratch.products[token] = product;
}

// Starts to copy what is prepared of the `count` ≤ kChunk tokens from `first` on; zeros after them.
template <typename T>
__device__ void stage(const Scratch& scratch, int64_t first, int count, uint16_t (&to)[kArrays<T>][kChunk][kPitch]) {
  constexpr int kPieces = kArrays<T> * 8;  // of a token, 16 bytes each
  const char* from = scratch.prepared + first * kPieces * 16;
#pragma unroll 1  // addresses would fill the registers
  for (int i = (int)threadIdx.x; i < kChunk * kPieces; i += kBlock) {
    const int token = i / kPieces, piece = i % kPieces;
    const bool there = token < count;
    copy_async(&to[piece / 8][token][piece % 8 * 8], from + (there ? i : 0) * 16, there ? 16 : 0);
  }
  commit_copies();
}

// A chunk's steps and decays; each lane has those of its token. Prefix sums in plain float32 would cancel: with S near
// −1000 the difference of two is off by 6e-5, and so is, relatively, the decay. They are therefore kept in two parts:
// multiples of 2⁻¹⁰, whose sums are exact, and remainders, whose sums lose 2⁻²⁹. A log decay below −256 counts as −256:
// float32's exp is 0 from −104 on.
struct Decays {
  float delta;         // Δ, 0 from token L on
  float coarse, fine;  // S
  float from_start;    // exp(S)
  float until_end;     // Δ exp(S_end − S)
  float chunk_decay;         // exp(S_end)

  __device__ Decays(float delta, float A) : delta(delta) {
    const float log_decay = fmaxf(delta * A, -256.0f);
    coarse = floorf(log_decay * 1024.0f) * (1.0f / 1024.0f);
    fine = log_decay - coarse;
#pragma unroll
    for (int distance = 1; distance < kChunk; distance *= 2) {
      const float coarse_before = __shfl_up_sync(kWholeWarp, coarse, distance);
      const float fine_before = __shfl_up_sync(kWholeWarp, fine, distance);
      if (lane_index() >= distance) coarse += coarse_before, fine += fine_before;
    }
    const float coarse_end = from_lane(coarse, kChunk - 1), fine_end = from_lane(fine, kChunk - 1);
    from_start = expf(coarse + fine);
    until_end = expf((coarse_end - coarse) + (fine_end - fine)) * delta;
    chunk_decay = expf(coarse_end + fine_end);
  }
};

// B operands of two products lie in the registers of one load_matrices.
typedef uint32_t Operand[2];
__device__ __forceinline__ const Operand& operand(const uint32_t (&registers)[4], int i) {
  return reinterpret_cast<const Operand&>(registers[2 * i]);
}

// multiply(i, j) for the parts i and j of two operands of `parts` parts whose products, of about 2^(−8·(i + j)), count:
// the smallest first.
template <int parts, typename Multiply>
__device__ __forceinline__ void for_each_product(Multiply multiply) {
#pragma unroll
  for (int order = parts - 1; order >= 0; --order) {
#pragma unroll
    for (int i = 0; i <= order; ++i) multiply(i, order - i);
  }
}

// The A operand Mᵀ (16 columns of M, 16 rows) of a row-major M.
template <typename M>
__device__ __forceinline__ void load_left_transposed(uint32_t (&a)[4], const M (&m)[kChunk][kPitch], int row,
                                                     int column) {
  const int lane = lane_index();
  load_matrices_transposed(a, &m[row + lane / 16 * 8 + lane % 8][column + lane / 8 % 2 * 8]);
}

// This warp's square of C Bᵀ ⊙ W.
template <typename T, typename Prepared>
__device__ void make_scores(ChunkShared<T>& m, const Prepared& prepared, const Decays& d) {
  const int lane = lane_index(), first_t = warp_index() / 2 * 16, first_s = warp_index() % 2 * 16;
  if (first_s > first_t) return;  // all above the diagonal; never read
  float scores[2][4] = {};        // [16, 8] at s = first_s and first_s + 8
#pragma unroll
  for (int n = 0; n < kN; n += 16) {
    uint32_t C[kOperandParts<T>][4], B[kOperandParts<T>][4];
#pragma unroll
    for (int i = 0; i < kOperandParts<T>; ++i) {
      load_matrices(C[i], &prepared[kC + i][first_t + lane % 16][n + lane / 16 * 8]);
      load_matrices(B[i], &prepared[kB<T> + i][first_s + lane / 16 * 8 + lane % 8][n + lane / 8 % 2 * 8]);
    }
    for_each_product<kOperandParts<T>>([&](int i, int j) {
      multiply<bf16>(scores[0], C[i], operand(B[j], 0));
      multiply<bf16>(scores[1], C[i], operand(B[j], 1));
    });
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = first_t + lane / 4 + half * 8;
    const float coarse_t = from_lane(d.coarse, t), fine_t = from_lane(d.fine, t);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = first_s + 8 * j + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int s = column + i;
        const float exponent = (coarse_t - from_lane(d.coarse, s)) + (fine_t - from_lane(d.fine, s));
        const float decay = __expf(exponent) * from_lane(d.delta, s);
        float& score = scores[j][2 * half + i];
        score = s < t ? score * decay : 0.0f;
      }
      uint32_t parts[kOperandParts<T>];
      split({scores[j][2 * half], scores[j][2 * half + 1]}, parts);
      for (int i = 0; i < kOperandParts<T>; ++i) store_pair(&m.scores[i][t][column], parts[i]);
    }
  }
}

// exp(S_t) h C_t: this warp's 16 rows of yᵀ.
template <typename T, typename Prepared>
__device__ void from_before(float (&y)[kChunk / 8][4], const float (&h)[kN / 8][4], const Prepared& prepared,
                            const Decays& d) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < kN; n += 32) {
    uint32_t left[2][kOperandParts<T>][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // the accumulators of two tiles are the operand of one: see tensor_core.h
        const float(&tile)[4] = h[n / 8 + 2 * k + i / 2];
        uint32_t parts[kOperandParts<T>];
        split({tile[i % 2 * 2], tile[i % 2 * 2 + 1]}, parts);
#pragma unroll
        for (int part = 0; part < kOperandParts<T>; ++part) left[k][part][i] = parts[part];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kChunk / 8; ++tile) {
      uint32_t C[kOperandParts<T>][4];
#pragma unroll
      for (int i = 0; i < kOperandParts<T>; ++i) {
        load_matrices(C[i], &prepared[kC + i][8 * tile + lane % 8][n + lane / 8 * 8]);
      }
      for_each_product<kOperandParts<T>>([&](int i, int j) {
        multiply<bf16>(y[tile], left[0][i], operand(C[j], 0));
        multiply<bf16>(y[tile], left[1][i], operand(C[j], 1));
      });
    }
  }
#pragma unroll
  for (int tile = 0; tile < kChunk / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float from_start = from_lane(d.from_start, 8 * tile + lane % 4 * 2 + i);
      y[tile][i] *= from_start;
      y[tile][2 + i] *= from_start;
    }
  }
}

// y += ((C Bᵀ ⊙ W) x)ᵀ, this warp's 16 rows.
template <typename T>
__device__ void from_inside(float (&y)[kChunk / 8][4], const ChunkShared<T>& m) {
  const int lane = lane_index();
  uint32_t x[2][kOperandParts<T>][4];
#pragma unroll
  for (int i = 0; i < kOperandParts<T>; ++i) {
    load_left_transposed(x[0][i], m.x[i], 0, 16 * warp_index());
    load_left_transposed(x[1][i], m.x[i], 16, 16 * warp_index());
  }
#pragma unroll
  for (int tile = 0; tile < kChunk / 8; ++tile) {
    uint32_t scores[kOperandParts<T>][4];
#pragma unroll
    for (int i = 0; i < kOperandParts<T>; ++i) {
      load_matrices(scores[i], &m.scores[i][8 * tile + lane % 8][lane / 8 * 8]);
    }
    for_each_product<kOperandParts<T>>([&](int i, int j) {
      multiply<bf16>(y[tile], x[0][i], operand(scores[j], 0));
      if (8 * tile >= 16) multiply<bf16>(y[tile], x[1][i], operand(scores[j], 1));
    });
  }
}

// h ← exp(S_end) h + (x ⊙ Δ exp(S_end − S))ᵀ B, this warp's 16 rows.
template <typename T, typename Prepared>
__device__ void advance(float (&h)[kN / 8][4], const ChunkShared<T>& m, const Prepared& prepared, float chunk_decay) {
  const int lane = lane_index();
  uint32_t x[2][kParts][4];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) load_left_transposed(x[k][i], m.weighted[i], 16 * k, 16 * warp_index());
  }
#pragma unroll
  for (int n = 0; n < kN; n += 16) {
    float added[2][4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t B[kParts][4];
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        load_matrices_transposed(B[i], &prepared[kB<T> + i][16 * k + lane % 16][n + lane / 16 * 8]);
      }
      for_each_product<kParts>([&](int i, int j) {
        multiply<bf16>(added[0], x[k][i], operand(B[j], 0));
        multiply<bf16>(added[1], x[k][i], operand(B[j], 1));
      });
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& value = h[n / 8 + i / 4][i % 4];
      value = fmaf(chunk_decay, value, added[i / 4][i % 4]);
    }
  }
}

// One block a head of a sample.
template <typename T>
__global__ void __launch_bounds__(kBlock, 3) mamba2_mixer_fwd_chunks_kernel(MixerForward a, Sizes n, Scratch scratch) {
  ChunkShared<T>& m = shared<ChunkShared<T>>();
  const int lane = lane_index(), warp = warp_index(), L = (int)n.L, H = (int)n.H;
  const int head = (int)(blockIdx.x % (unsigned)H);
  const int64_t b = blockIdx.x / (unsigned)H, first_token = b * n.L;
  const int channel = head * kP + 2 * lane;
  const Rows<T> rows(a, n, b);

  // h[n / 8][…] of rows p = 16·warp + lane/4 and 8 below, columns n + 2·(lane % 4) and the next.
  float h[kN / 8][4];
  const int p = 16 * warp + lane / 4;
  const float* h_in = a.initial.data + b * a.initial.batch_stride + head * a.initial.head_stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const auto two = load_vector<2>(h_in + (p + i % 2 * 8) * a.initial.row_stride + i / 2 * 8);
    h[i / 2][i % 2 * 2] = two.at[0];
    h[i / 2][i % 2 * 2 + 1] = two.at[1];
  }

  // What is read ahead of a chunk: the rows of x that this warp's tokens need; dt and C·B of the lane's token.
  uint32_t window[kTaps - 1 + kShare];
  float raw_step, product;
  const auto load_steps = [&](int start) {
    const bool there = start + lane < L;
    raw_step = there ? step_of<T>(a, b, start + lane, head) : 0.0f;
    product = there ? scratch.products[first_token + start + lane] : 0.0f;
  };
  load_steps(0);
#pragma unroll
  for (int i = 0; i < kTaps - 1 + kShare; ++i) window[i] = rows.at(warp * kShare + i - (kTaps - 1), channel);
  stage<T>(scratch, first_token, L, m.prepared[0]);

  for (int start = 0; start < L; start += kChunk) {
    const int turn = start / kChunk % 2;
    // The head's parameters are read again for every chunk: their registers are needed.
    const Decays d(start + lane < L ? softplus(raw_step + a.dt_bias[head]) : 0.0f, decay_rate(a.A_log[head]));
    const Convolution convolution(a, channel);

    // Lane i has those of this warp's token i.
    const float skip = from_lane(fmaf(d.delta, product, a.D[head]), warp * kShare + lane);
    const float until_end = from_lane(d.until_end, warp * kShare + lane);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int token = warp * kShare + i;
      const float2 x = convolution.of<T>(window + i);
      uint32_t operands[kOperandParts<T>];
      split(x, operands);
      for (int part = 0; part < kOperandParts<T>; ++part) store_pair(&m.x[part][token][2 * lane], operands[part]);
      const float skip_here = from_lane(skip, i), weight = from_lane(until_end, i);
      store_pair(&m.y[token][2 * lane], float2{skip_here * x.x, skip_here * x.y});
      uint32_t parts[kParts];
      split({x.x * weight, x.y * weight}, parts);
      for (int part = 0; part < kParts; ++part) store_pair(&m.weighted[part][token][2 * lane], parts[part]);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (start + kChunk < L) {
      stage<T>(scratch, first_token + start + kChunk, L - start - kChunk, m.prepared[turn ^ 1]);
    }

    const auto& prepared = m.prepared[turn];
    make_scores(m, prepared, d);
    float y[kChunk / 8][4] = {};
    from_before<T>(y, h, prepared, d);
    __syncthreads();
    from_inside(y, m);
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      m.y[i / 4 * 8 + lane % 4 * 2 + i % 2][p + i / 2 % 2 * 8] += y[i / 4][i % 4];
    }
    uint32_t z[kShare];  // loaded now, needed once h is advanced
    const T* z_row = row_of<T>(a.z, b, start + warp * kShare) + channel;
#pragma unroll
    for (int i = 0; i < kShare; ++i, z_row += a.z.row_stride) {
      z[i] = start + warp * kShare + i < L ? load_pair(z_row) : 0;
    }
    advance(h, m, prepared, d.chunk_decay);
    load_steps(start + kChunk);
    const int next = start + kChunk + warp * kShare - (kTaps - 1);
    const T* row = rows.tokens + next * rows.stride + channel;
#pragma unroll
    for (int i = 0; i < kTaps - 1 + kShare; ++i, row += rows.stride) window[i] = next + i < L ? load_pair(row) : 0;
    __syncthreads();

    float squares[kShare] = {};
    auto* gated = (Gated<T>*)scratch.gated + ((first_token + start + warp * kShare) * H + head) * kP + 2 * lane;
#pragma unroll
    for (int i = 0; i < kShare; ++i, gated += H * kP) {
      const int token = warp * kShare + i;
      if (start + token >= L) break;
      const auto pair = load_vector<2>(&m.y[token][2 * lane]);
      squares[i] = write_gated<T>({pair.at[0], pair.at[1]}, z[i], gated);
    }
    const float sum = sum_of_each<kWarpSize>(squares);
    const int token = start + warp * kShare + lane / (kWarpSize / kShare);
    if (lane % (kWarpSize / kShare) == 0 && token < L) scratch.squares[(first_token + token) * H + head] = sum;
  }

  float* h_out = a.last.data + b * a.last.batch_stride + head * a.last.head_stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const Vector<float, 2> two{h[i / 2][i % 2 * 2], h[i / 2][i % 2 * 2 + 1]};
    store_vector<2>(h_out + (p + i % 2 * 8) * a.last.row_stride + i / 2 * 8, two);
  }
  carry_convolution(a, n, rows, b, head);
}

}  // namespace
}  // namespace cuda
}  // namespace mvar
