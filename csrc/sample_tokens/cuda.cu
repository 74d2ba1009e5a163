// Token sampling in CUDA: one launch from two rows of logits to a token. The result at one position
// (mvar_kernels/ops/sample_tokens/reference.py), bit for bit:
//
//     logits = cond + c·(cond − uncond), each row relative to its largest, and over the temperature
//     left   = the codes that top-k, and then top-p, keep
//     token  = the code left with the largest sum of logit, relative to the largest, and noise, the first of equals
//
// A block samples at one position, in shared memory: logits are read from memory once, two rows of them twice, as keys,
// which are integers of the same order. Filters store which codes are left, in an order that does not matter; noise is
// computed for those alone.
//
//     keys    | code 0 | 1 | 2 | … | V−1 |
//     left    | a code | … |                        none before the first filter: all are left
//     bins    | what lies in each of 2048 equal intervals of keys, from the highest down |
//
// Both filters look for the largest key such that what lies at or above it, a count of codes or a sum of weights, is as
// much as they need, and so does the choice between equal logits, over codes. A pass puts what is left in bins, adds
// them up from the top and goes on inside of the bin where the sum is reached, 11 bits of the key at a time: three
// passes of three barriers at most, whatever the logits are. (Halving the interval of keys would take 32 passes over
// all codes, of a barrier each.) Atomics add integers alone, so that results do not depend on the order of threads.
//
// A row of 4,096 codes in float32 with top-k = 900 and top-p = 0.96 reads 16 KB, twice that with an unconditional row,
// and waits at 26 barriers. The 680 rows of an image are 11 MB, 2.6 µs at the 4.3 TB/s of an H200. By the machine code
// for sm_90 a row takes some 25,000 instructions of a warp, a quarter of them for sums over bins, a third for weights
// and noise; four a cycle on 132 multiprocessors at 1.75 GHz are 18 µs an image. Expected, not yet measured: 20 to 40
// µs an image in large batches, bound by instructions; 6 µs for a scale whose rows all run at once.
#include <type_traits>

#include "common/cuda/launch.h"
#include "common/cuda/numbers.h"
#include "common/cuda/reduce.h"
#include "sample_tokens/noise.h"
#include "sample_tokens/per_image.h"
#include "sample_tokens/sample_tokens.h"

namespace mvar {
namespace cuda {
namespace {

constexpr int kDigit = 11;  // bits of a key that a pass decides
constexpr int kBins = 1 << kDigit;
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__;

// Keys have the order of logits, where −0 has become +0.
__device__ __forceinline__ uint32_t key_of(Vec logit) {
  const VecInt bits = as_int(logit);
  return (uint32_t)bits ^ ((uint32_t)(bits >> 31) | 0x80000000u);
}
__device__ __forceinline__ Vec logit_of(uint32_t key) {
  return as_float((VecInt)(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)));
}

// +∞ and NaN count as the largest finite logit.
__device__ __forceinline__ Vec finite(Vec logit) { return Vec(kLargest) >= logit ? logit : kLargest; }

// What a row's logits count relative to: its largest, a finite number.
__device__ __forceinline__ Vec largest_logit(uint32_t highest) {
  const Vec logit = logit_of(highest);
  return logit >= -kLargest ? logit : -kLargest;
}

// The noise word of a code.
__device__ __forceinline__ uint32_t word_of_code(const Philox& philox, uint32_t code) {
  VecWide words[4];
  philox(code >> 2, words);
  const VecWide even = code & 2 ? words[2] : words[0], odd = code & 2 ? words[3] : words[1];
  return (uint32_t)(code & 1 ? odd : even);
}

template <int n>
using Number = std::integral_constant<int, n>;

// The key that a search found; how much of what lies at this very key was needed, and how much lies there.
struct Threshold {
  uint32_t key;
  uint64_t needed, found;
};

template <int kThreads, int kMaxCodes>
struct Shared {
  uint32_t keys[kMaxCodes];
  uint16_t left[2][kMaxCodes];  // of the last filter but one, and of the last
  // 64 bits in two parts, as atomics on 32 bits are much the faster. All zero between two passes.
  uint32_t bins_low[kBins], bins_high[kBins];
  uint64_t warps[kThreads / kWarpSize];  // a number from each warp
  int bin;                               // where a pass goes on, and what lies above it and inside
  uint64_t above, inside;
};

// The codes of one position that are left. All threads of the block call each function together.
template <int kThreads, int kMaxCodes>
struct Row {
  static constexpr int kOwnBins = kBins / kThreads;
  Shared<kThreads, kMaxCodes>& memory;
  const int V;
  int count;                       // codes left
  const uint16_t* left = nullptr;  // which; null: all
  // No key that is left is outside of these.
  uint32_t highest = 0, lowest = key_of(-kInfinity);

  __device__ Row(int V) : memory(shared<Shared<kThreads, kMaxCodes>>()), V(V), count(V) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) memory.bins_low[bin] = memory.bins_high[bin] = 0;
  }

  __device__ uint32_t code_at(int i) const { return left ? left[i] : i; }

  __device__ uint64_t largest_of_block(uint64_t x) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const uint64_t other = __shfl_xor_sync(kWholeWarp, x, distance);
      x = other > x ? other : x;
    }
    __syncthreads();  // the memory may still be read from the last time
    if (threadIdx.x % kWarpSize == 0) memory.warps[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    for (const uint64_t other : memory.warps) x = other > x ? other : x;
    return x;
  }

  template <typename T>
  __device__ Vec largest_of(const T* logits) {
    uint32_t highest = 0;
#pragma unroll 8
    for (int code = threadIdx.x; code < count; code += kThreads) {
      const uint32_t key = key_of(finite(mvar::to_float(logits[code])));
      highest = key > highest ? key : highest;
    }
    return largest_logit((uint32_t)largest_of_block(highest));
  }

  // The guided logits as keys.
  template <typename T>
  __device__ void read(const T* cond, const T* uncond, float guidance) {
    const Vec cond_largest = uncond ? largest_of(cond) : Vec(), uncond_largest = uncond ? largest_of(uncond) : Vec();
#pragma unroll 8
    for (int code = threadIdx.x; code < count; code += kThreads) {
      Vec logit = finite(mvar::to_float(cond[code]));
      if (uncond) {
        logit = logit - cond_largest;
        const Vec other = finite(mvar::to_float(uncond[code])) - uncond_largest;
        const bool in_both = logit > -kInfinity && other > -kInfinity;
        logit = finite(logit + Vec(guidance) * (in_both ? logit - other : Vec()));
      }
      const uint32_t key = key_of(logit + 0.0f);  // −0 + 0 is +0
      memory.keys[code] = key;
      highest = key > highest ? key : highest;
    }
    highest = (uint32_t)largest_of_block(highest);
  }

  // The logits, relative to the largest, over a temperature.
  __device__ void temper(float temperature) {
    const Vec largest = largest_logit(highest);
    const auto tempered = [&](uint32_t key) { return key_of((logit_of(key) - largest) / Vec(temperature) + 0.0f); };
    for (int code = threadIdx.x; code < V; code += kThreads) memory.keys[code] = tempered(memory.keys[code]);
    __syncthreads();
    highest = tempered(highest);
  }

  // Sum: uint32_t where no sum can pass 2³².
  template <typename Sum>
  __device__ void put_in_bin(uint32_t bin, uint32_t amount) {
    const uint32_t before = atomicAdd(&memory.bins_low[bin], amount);
    if (sizeof(Sum) > 4 && before + amount < before) atomicAdd(&memory.bins_high[bin], 1u);
  }

  template <typename Sum>
  __device__ Sum empty_bin(int bin) {
    uint64_t sum = memory.bins_low[bin];
    memory.bins_low[bin] = 0;
    if (sizeof(Sum) > 4) {
      sum |= (uint64_t)memory.bins_high[bin] << 32;
      memory.bins_high[bin] = 0;
    }
    return (Sum)sum;
  }

  // The sum over the threads before this one, and in `total` over all.
  template <typename Sum>
  __device__ Sum sum_before(Sum own, Sum& total) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    Sum sum = own;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const Sum other = __shfl_up_sync(kWholeWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == kWarpSize - 1) memory.warps[warp] = sum;
    __syncthreads();
    Sum before = sum - own;
    total = 0;
    for (int i = 0; i < kThreads / kWarpSize; ++i) {
      if (i < warp) before += (Sum)memory.warps[i];
      total += (Sum)memory.warps[i];
    }
    return before;
  }

  // The largest key with need(total) or more at or above it, where the i-th code left has key_at(i) and counts
  // amount_at(i). Keys lie in the interval [highest − range, highest], which passes narrow. 1 ≤ need(total) ≤ total.
  template <typename Sum, typename KeyAt, typename AmountAt, typename Need>
  __device__ Threshold search(uint32_t highest, uint32_t range, KeyAt key_at, AmountAt amount_at, Need need) {
    Sum above = 0, needed = 0;  // what lies above the interval
    int bits = 32 - __clz((int)range);
    while (true) {
      const int shift = bits > kDigit ? bits - kDigit : 0;
#pragma unroll sizeof(Sum) > 4 ? 1 : 4
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint32_t distance = highest - key_at(i);  // of keys above it wraps, to more than any range but the first
        if (distance <= range) put_in_bin<Sum>(distance >> shift, amount_at(i));
      }
      __syncthreads();

      Sum inside[kOwnBins], sum = 0, total;
      for (int j = 0; j < kOwnBins; ++j) sum += inside[j] = empty_bin<Sum>(threadIdx.x * kOwnBins + j);
      Sum before = above + sum_before(sum, total);
      if (needed == 0) needed = (Sum)need(total);
      if (before < needed && needed <= before + sum) {  // in one thread of the block, and in one of its bins
        for (int j = 0; j < kOwnBins; before += inside[j++]) {
          if (needed <= before || needed > before + inside[j]) continue;
          memory.bin = threadIdx.x * kOwnBins + j;
          memory.above = before;
          memory.inside = inside[j];
        }
      }
      __syncthreads();

      highest -= (uint32_t)memory.bin << shift;
      above = (Sum)memory.above;
      if (shift == 0) return {highest, needed - above, memory.inside};
      range = (1u << shift) - 1;
      bits = shift;
    }
  }

  // Keeps the codes for which stays(key, code).
  template <typename Stays>
  __device__ void keep(Stays stays) {
    static_assert(kMaxCodes <= 32 * kThreads, "a bit for each code of a thread");
    uint32_t kept = 0, total;
    for (int i = threadIdx.x, bit = 0; i < count; i += kThreads, ++bit) {
      const uint32_t code = code_at(i);
      kept |= (stays(memory.keys[code], code) ? 1u : 0u) << bit;
    }
    uint32_t place = sum_before((uint32_t)__popc(kept), total);
    uint16_t* const to = memory.left[left == memory.left[0]];
    for (int i = threadIdx.x; kept; i += kThreads, kept >>= 1) {
      if (kept & 1) to[place++] = (uint16_t)code_at(i);
    }
    __syncthreads();
    count = (int)total;
    left = to;
  }

  // Keeps every logit ≥ the k-th largest.
  __device__ void keep_top_k(uint32_t k) {
    const auto key_at = [&](int i) { return memory.keys[i]; };
    const auto one = [](int) { return 1u; };
    lowest = search<uint32_t>(highest, highest - lowest, key_at, one, [&](uint32_t) { return k; }).key;
    keep([&](uint32_t key, uint32_t) { return key >= lowest; });
  }

  // In ascending order, equal logits in the order of their codes, drops while the sum of the weights is at most
  // (1−p) of the total, but never the last.
  __device__ void keep_top_p(double p) {
    const auto key_at = [&](int i) { return memory.keys[code_at(i)]; };
    const Vec largest = largest_logit(highest);
    const auto weight = [&](uint32_t key) { return (uint32_t)to_int(exp_negative(logit_of(key) - largest) * 0x1p30f); };
    const auto weight_at = [&](int i) { return weight(key_at(i)); };
    uint32_t threshold = highest, equals = 1, first = 0;
    bool several = true;
    if (logit_of(highest) > -kInfinity) {
      const auto need = [&](uint64_t total) {
        const uint64_t most = (uint64_t)((double)total * (1.0 - p));
        return total - (most < total ? most : total - 1);
      };
      const Threshold cut = search<uint64_t>(highest, highest - lowest, key_at, weight_at, need);
      const uint64_t one = weight(cut.key);
      threshold = cut.key;
      several = cut.found > one;
      if (several) equals = (uint32_t)((cut.needed + one - 1) / one);
    }  // else all are ruled out, nothing has a weight, and the last one stays
    if (several) {  // those from the code `first` on stay
      const auto code = [&](int i) { return code_at(i); };
      const auto equal = [&](int i) { return key_at(i) == threshold ? 1u : 0u; };
      first = search<uint32_t>(V - 1, V - 1, code, equal, [&](uint32_t) { return equals; }).key;
    }
    keep([&](uint32_t key, uint32_t code) { return key > threshold || (key == threshold && code >= first); });
  }

  // The code with the largest sum of logit and noise, the first of equals; 0 if there is none above −∞.
  __device__ uint32_t sample(const Philox& philox) {
    const auto ranked = [](Vec score, uint32_t code) { return (uint64_t)key_of(score) << 32 | ~code; };
    const Vec largest = largest_logit(highest);
    uint64_t best = ranked(-kInfinity, 0);
#pragma unroll 1  // long as it is
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t code = code_at(i);
      const uint64_t rank = ranked((logit_of(memory.keys[code]) - largest) + gumbel(word_of_code(philox, code)), code);
      best = rank > best ? rank : best;
    }
    return ~(uint32_t)largest_of_block(best);
  }
};

template <typename T>
__device__ const T* row_of(const Tokens& t, uint32_t b, uint32_t l) {
  return (const T*)t.data + b * t.batch_stride + l * t.row_stride;
}

// kPlain: one number for all images, no temperature, and one sample.
template <typename T, bool kPlain, int kThreads, int kMaxCodes>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    sample_tokens_fwd_kernel(Sampling sampling, SamplingSizes n, int64_t* tokens) {
  const uint32_t b = blockIdx.x / (uint32_t)n.L, l = blockIdx.x % (uint32_t)n.L;
  const Filters filters = kPlain ? sampling.filters : filters_of(sampling, b);
  const bool guided = sampling.uncond.data && filters.guidance != 0;
  Row<kThreads, kMaxCodes> row((int)n.V);
  row.read(row_of<T>(sampling.cond, b, l), guided ? row_of<T>(sampling.uncond, b, l) : nullptr, filters.guidance);
  if (!kPlain && filters.temperature != 1) row.temper(filters.temperature);
  if (0 < filters.top_k && filters.top_k < n.V) row.keep_top_k((uint32_t)filters.top_k);
  if (filters.top_p < 1) row.keep_top_p(filters.top_p);
  const uint32_t image = (uint32_t)sampling.image_index[b * sampling.image_index_stride];
  const int64_t samples = kPlain ? 1 : sampling.samples;
  for (int64_t s = 0; s < samples; ++s) {
    const uint32_t position = (uint32_t)(s * n.L) + l;
    const uint32_t token = row.sample({*sampling.seed, position, sampling.scale_index, image});
    if (threadIdx.x == 0) tokens[blockIdx.x * samples + s] = token;
  }
}

template <typename T, bool kPlain>
void sample_from(const Sampling& sampling, SamplingSizes n, int64_t* tokens) {
  const auto start = [&](auto threads, auto codes) {
    launch(sample_tokens_fwd_kernel<T, kPlain, threads, codes>, dim3((unsigned)(n.B * n.L)), threads,
           sizeof(Shared<threads, codes>), n.stream, sampling, n, tokens);
  };
  if (n.V <= 4096) return start(Number<256>{}, Number<4096>{});
  start(Number<1024>{}, Number<16384>{});
}

template <typename T>
void sample(const Sampling& sampling, SamplingSizes n, int64_t* tokens, float*) {
  const bool plain = sampling.filters.temperature == 1 && !sampling.per_image && sampling.samples == 1;
  (plain ? sample_from<T, true> : sample_from<T, false>)(sampling, n, tokens);
}

}  // namespace

const SampleTokensKernels sample_tokens = {
    {sample<float>, sample<bf16>, sample<f16>},
    {},
    [](int64_t) -> int64_t { return 0; },
};

}  // namespace cuda
}  // namespace mvar
