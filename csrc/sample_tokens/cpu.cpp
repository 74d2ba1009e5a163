// Token sampling on CPU. A row of logits is read from memory once, into the first-level cache, as keys
// (filter.h); noise is made for the codes alone that the filters leave.

#include "sample_tokens.h"

#include "common/threads.h"
#include "filter.h"
#include "per_image.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Below this many logits starting the threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 14;

constexpr int64_t kLine = 64;  // bytes of the cache

template <typename T>
MVAR_INLINE const T* row_of(const Tokens& t, int64_t b, int64_t l) {
  return (const T*)t.data + b * t.batch_stride + l * t.row_stride;
}

// A thread's own memory: the row, and a noise word for each of its codes.
struct Scratch {
  Row row;
  int32_t* words;
};

// The noise of all codes at once (make_words) takes up to four vectors more than there are codes.
MVAR_INLINE int64_t array_size(int64_t V) { return (V + kWidth - 1) / kWidth * kWidth + 4 * kWidth; }

MVAR_INLINE Scratch scratch_from(Carver& carver, int64_t V) {
  auto take = [&] { return (int32_t*)carver.take(array_size(V)); };
  return {{take(), take(), take(), 0, 0, 0, true}, take()};
}

int64_t share(int64_t V) {
  Carver carver(nullptr);
  scratch_from(carver, V);
  return carver.needed();
}

int64_t workspace(int64_t V) { return threads() * share(V); }

// +∞ and NaN count as the largest finite logit, a NaN with a sign as −∞. Adding 0 turns −0 into +0.
MVAR_INLINE VecInt finite_key(Vec logits) {
  return larger(smaller(key_of((VecInt)(logits + 0.0f)), splat_int(kLargest)), splat_int(kRuledOut));
}

MVAR_INLINE Vec finite(Vec logits) {
  const Vec most = splat(__FLT_MAX__);
  return logits <= most ? logits : most;
}

// The largest of a row of logits.
template <typename T>
float largest_of(const T* logits, int64_t V) {
  VecInt highest = splat_int(kRuledOut);
  for_each_vector(V, [&](int64_t v, auto lanes, int) MVAR_INLINE_LAMBDA {
    highest = larger(highest, keep_or(kRuledOut, key_of((VecInt)load(logits + v, lanes)), lanes));
  });
  return largest_logit(largest(highest));
}

// The guided logits of one position as keys, all codes.
template <typename T>
void read_row(Row& row, float guidance, int64_t V, const T* cond, const T* uncond) {
  const Vec cond_largest = splat(uncond ? largest_of(cond, V) : 0.0f);
  const Vec uncond_largest = splat(uncond ? largest_of(uncond, V) : 0.0f);
  VecInt lowest = splat_int(INT32_MAX), highest = splat_int(INT32_MIN);
  for_each_vector(V, [&](int64_t v, auto lanes, int) MVAR_INLINE_LAMBDA {
    Vec logits = load(cond + v, lanes);
    if (uncond) {
      logits = finite(logits) - cond_largest;
      const Vec other = finite(load(uncond + v, lanes)) - uncond_largest;
      const VecInt ruled_out = (logits == -__builtin_inff()) | (other == -__builtin_inff());
      logits += guidance * (ruled_out ? Vec{} : logits - other);
    }
    const VecInt key = finite_key(logits);
    store_int(row.keys + v, key);
    lowest = smaller(lowest, keep_or(INT32_MAX, key, lanes));
    highest = larger(highest, keep_or(INT32_MIN, key, lanes));
  });
  row.count = V;
  row.unfiltered = true;
  row.finish();
  row.lowest = smallest(lowest);
  row.highest = largest(highest);
}

// The logits, relative to the largest, over a temperature.
void temper(Row& row, float temperature) {
  const Vec largest = splat(row.largest());
  auto tempered = [&](VecInt keys) MVAR_INLINE_LAMBDA { return finite_key((logit_of(keys) - largest) / temperature); };
  for (int64_t i = 0; i < row.count; i += kWidth) store_int(row.keys + i, tempered(load_int(row.keys + i)));
  row.finish();
  row.lowest = tempered(splat_int(row.lowest))[0];
  row.highest = tempered(splat_int(row.highest))[0];
}

// The row to be read next. It is brought into the cache piece by piece while this one's noise is made,
// which needs no memory: measured (Zen 5, V = 4096), reading then takes a sixth of the time.
struct Ahead {
  const char *cond, *uncond;
  int64_t bytes;

  MVAR_INLINE void fetch(int64_t part, int64_t parts) const {
    const int64_t lines = (bytes + kLine - 1) / kLine;
    const int64_t share = (lines + parts - 1) / parts;
    const int64_t end = (part + 1) * share < lines ? (part + 1) * share : lines;
    for (int64_t line = part * share; line < end; ++line) {
      __builtin_prefetch(cond + line * kLine, 0, 2);
      if (uncond) __builtin_prefetch(uncond + line * kLine, 0, 2);
    }
  }
};

// Four words for each of as many groups of four codes as a vector has lanes.
MVAR_INLINE void words_of_groups(const Philox& philox, VecInt group, VecBits words[4]) {
  VecWide even[4], odd[4];
  philox((VecWide)group, even);
  philox((VecWide)group >> 32, odd);
  for (int i = 0; i < 4; ++i) words[i] = (VecBits)((even[i] & kLow32) | odd[i] << 32);
}

// The word of each code.
MVAR_INLINE VecBits words_of_codes(const Philox& philox, VecInt code) {
  VecBits words[4];
  words_of_groups(philox, code >> 2, words);
  const VecInt odd = (code & 1) != 0, upper = (code & 2) != 0;
  return upper ? (odd ? words[3] : words[2]) : (odd ? words[1] : words[0]);
}

// words[i] is the noise of the row's i-th code. Made before they are used: a processor cannot overlap the
// long chains of operations of both Philox and the logarithms.
void make_words(const Scratch& scratch, const Philox& philox, int64_t V, const Ahead& ahead) {
  const Row& row = scratch.row;
  // Four codes share a counter: where many are left it is less work to make the words of all.
  if (4 * row.count < V) {
    const int64_t vectors = (row.count + kWidth - 1) / kWidth;
    for (int64_t i = 0; i < vectors; ++i) {
      ahead.fetch(i, vectors);
      store_int(scratch.words + i * kWidth, (VecInt)words_of_codes(philox, row.codes_at(i * kWidth)));
    }
    return;
  }
  // all[j·groups + g] is word j of the codes 4g … 4g+3.
  int32_t* all = row.weights;
  const int64_t groups = array_size(V) / 4, vectors = (V + 4 * kWidth - 1) / (4 * kWidth);
  for (int64_t i = 0; i < vectors; ++i) {
    ahead.fetch(i, vectors);
    VecBits words[4];
    words_of_groups(philox, lane_numbers() + (int32_t)(i * kWidth), words);
    for (int j = 0; j < 4; ++j) store_int(all + j * groups + i * kWidth, (VecInt)words[j]);
  }
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const VecInt code = row.codes_at(i);
    store_int(scratch.words + i, gather(all, (code & 3) * (int32_t)groups + (code >> 2)));
  }
}

// body(i, scratch) for the i-th of all samples, with its codes filtered and its noise words made.
template <typename T, typename Body>
void for_each_position(const Sampling& sampling, SamplingSizes n, float* shares, Body body) {
  const int64_t positions = n.B * n.L;
  auto cond = [&](int64_t i) { return row_of<T>(sampling.cond, i / n.L, i % n.L); };
  auto uncond = [&](int64_t i) {
    return sampling.uncond.data ? row_of<T>(sampling.uncond, i / n.L, i % n.L) : nullptr;
  };
#pragma omp parallel if (positions * n.V > kParallelElements)
  {
    Carver own(shares + this_thread() * share(n.V));
    Scratch scratch = scratch_from(own, n.V);
    Row& row = scratch.row;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < positions; ++i) {
      const Filters filters = filters_of(sampling, i / n.L);
      read_row<T>(row, filters.guidance, n.V, cond(i), filters.guidance != 0 ? uncond(i) : nullptr);
      if (filters.temperature != 1) temper(row, filters.temperature);
      if (0 < filters.top_k && filters.top_k < n.V) keep_top_k(row, filters.top_k);
      if (filters.top_p < 1) keep_top_p(row, filters.top_p);
      const uint32_t image = (uint32_t)sampling.image_index[i / n.L * sampling.image_index_stride];
      const int64_t next = i + 1 < positions ? i + 1 : i;
      const Ahead ahead{(const char*)cond(next), (const char*)uncond(next), n.V * (int64_t)sizeof(T)};
      for (int64_t s = 0; s < sampling.samples; ++s) {
        make_words(scratch, {*sampling.seed, (uint32_t)(s * n.L + i % n.L), sampling.scale_index, image}, n.V, ahead);
        body(i * sampling.samples + s, scratch);
      }
    }
  }
}

// The code with the largest logit plus noise, the first of equals; 0 if there is none above −∞.
int64_t largest_code(const Scratch& scratch) {
  const Row& row = scratch.row;
  const Vec largest = splat(row.largest());
  Vec best = splat(-__builtin_inff());
  VecInt token{};
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec noise = gumbel((VecBits)load_int(scratch.words + i));
    const Vec score = (logit_of(load_int(row.keys + i)) - largest) + noise;  // padding is a NaN
    const VecInt better = score > best;
    best = better ? score : best;
    token = better ? row.codes_at(i) : token;
  }
  int lane = 0;
  for (int i = 1; i < kWidth; ++i)
    if (best[i] > best[lane] || (best[i] == best[lane] && token[i] < token[lane])) lane = i;
  return token[lane];
}

template <typename T>
void sample(const Sampling& sampling, SamplingSizes n, int64_t* tokens, float* workspace) {
  for_each_position<T>(sampling, n, workspace,
                       [&](int64_t i, const Scratch& scratch) { tokens[i] = largest_code(scratch); });
}

// Leaves in the row the codes whose softmax weight is not zero, and in row.weights the weights, as floats
// and relative to the largest; returns their sum.
float soft_weights(Scratch& scratch, const SoftEmbedding& soft) {
  Row& row = scratch.row;
  const Vec largest = splat(row.largest());
  Vec highest = splat(-__builtin_inff());
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec noise = gumbel((VecBits)load_int(scratch.words + i));
    const Vec score = ((logit_of(load_int(row.keys + i)) - largest) * soft.sharpness + noise) / soft.temperature;
    store_int(row.weights + i, (VecInt)score);
    highest = score > highest ? score : highest;
  }
  float most = highest[0];
  for (int i = 1; i < kWidth; ++i) most = highest[i] > most ? highest[i] : most;

  Vec total{};
  int64_t left = 0;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec weight = exp_negative((Vec)load_int(row.weights + i) - most);  // 0 for padding, a NaN
    total += weight;
    const uint32_t bits = bits_of(weight > 0.0f);
    compress(row.codes + left, row.codes_at(i), bits);
    compress(row.weights + left, (VecInt)weight, bits);
    left += __builtin_popcount(bits);
  }
  row.count = left;
  return sum(total);
}

// The codebook's rows averaged with the row's weights.
template <typename C>
void average(C* mean, const Row& row, const SoftEmbedding& soft, float total) {
  const float* weights = (const float*)row.weights;
  for_each_vector(soft.width, [&](int64_t c, auto lanes, int) MVAR_INLINE_LAMBDA {
    const C* column = (const C*)soft.codebook + c;
    Vec partial[kSlots] = {};
    auto add = [&](int64_t i, int slot) MVAR_INLINE_LAMBDA {
      const Vec entry = load(column + row.codes[i] * soft.codebook_stride, lanes);
      partial[slot] = fma(splat(weights[i]), entry, partial[slot]);
    };
    int64_t i = 0;
    for (; i + kSlots <= row.count; i += kSlots)
      for (int slot = 0; slot < kSlots; ++slot) add(i + slot, slot);
    for (; i < row.count; ++i) add(i, 0);
    store(mean + c, ((partial[0] + partial[1]) + (partial[2] + partial[3])) / total, lanes);
  });
}

template <typename T, typename C>
void soft_embedding(const Sampling& sampling, const SoftEmbedding& soft, SamplingSizes n, void* mean, float* workspace) {
  for_each_position<T>(sampling, n, workspace, [&](int64_t i, Scratch& scratch) {
    const float total = soft_weights(scratch, soft);
    average((C*)mean + i * soft.width, scratch.row, soft, total);
  });
}

}  // namespace

const SampleTokensKernels sample_tokens = {
    {sample<float>, sample<bf16>},
    {{soft_embedding<float, float>, soft_embedding<float, bf16>}, {soft_embedding<bf16, float>, soft_embedding<bf16, bf16>}},
    workspace,
};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
