// What forward and backward share: the walk over the schedule, norms, and the scores of a block of queries.
#pragma once

#include "common/panels.h"
#include "common/threads.h"
#include "scale_attention.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Queries and keys are taken in blocks, so that a panel of keys stays in the first-level cache for a
// block of queries, and a block's scores in the second-level one.
constexpr int64_t kQueryBlock = 8 * kTileRows;
constexpr int64_t kKeyBlock = 256;
// From one row of scores to the next. Rows a power of two apart would share few sets of the cache.
constexpr int64_t score_stride(int64_t keys) { return (keys + kPanel - 1) / kPanel * kPanel + 16; }
constexpr int64_t kScoreStride = score_stride(kKeyBlock);
static_assert(kKeyBlock % kPanel == 0, "a block of keys is a multiple of the panel");

// Below this many multiplications starting the threads costs more than they save.
constexpr int64_t kParallelMultiplications = 1 << 19;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLog2 = 0.6931471805599453f;
constexpr float kMaxLogTemperature = 4.605170185988092f;  // log 100
constexpr float kNormEps = 1e-12f;
constexpr float kLeastFactor = 1e-37f;
constexpr float kLeastScore = -1e4f;  // far below the exponent of any float

typedef ScaleAttentionSizes Sizes;

MVAR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
MVAR_INLINE T* row(const Heads& t, int64_t b, int64_t l, int64_t h) {
  return (T*)t.data + b * t.batch_stride + l * t.row_stride + h * t.head_stride;
}

// Rows of one head.
template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
  MVAR_INLINE const T* operator()(int64_t i) const { return first + i * stride; }
};

struct Head {
  int64_t b, h;
};

// Of the keys and values of a head of q.
MVAR_INLINE Head key_head(const Sizes& n, Head at) { return {at.b, at.h / n.group}; }

// Rows first.. of q.
struct QueryBlock {
  int64_t first, rows;
  MVAR_INLINE int64_t tiled_rows() const { return round_up(rows, kTileRows); }
};

// One scale: its rows of q (none where q holds only later scales) and the keys they attend to.
struct Span {
  int64_t first_row, last_row, first_key, last_key;
  // Whether keys start afresh with this span, and whether no later span attends to them.
  bool opens, closes;
};

template <typename Body>
MVAR_INLINE void for_each_span(const Sizes& n, Body body) {
  if (n.scale_count == 1) return body(Span{0, n.Lq, 0, n.L, true, true});
  int64_t start = 0;
  for (int64_t i = 0; i < n.scale_count; ++i) {
    const int64_t end = start + n.scales[i];
    const int64_t first = start - (n.L - n.Lq);
    Span span{first, first < 0 ? first : end - (n.L - n.Lq), n.causal ? 0 : start, end, true, true};
    if (n.causal) {
      span.opens = i == 0;
      span.closes = i == n.scale_count - 1;
    }
    body(span);
    start = end;
  }
}

// How many of a span's keys the sample's queries see.
MVAR_INLINE int64_t seen_keys(const Sizes& n, const Span& span, int64_t b) {
  const int64_t keys = span.last_key - span.first_key;
  if (!n.key_lengths) return keys;
  const int64_t length = n.key_lengths[b];
  return length < 0 ? 0 : smaller(length, keys);
}

// The most keys between a span that opens and one that closes.
int64_t most_keys(const Sizes& n) {
  if (n.causal) return n.L;
  int64_t most = 0;
  for (int64_t i = 0; i < n.scale_count; ++i) most = n.scales[i] > most ? n.scales[i] : most;
  return most;
}

// Pairs of a query and a key, times the elements of each.
int64_t multiplications(const Sizes& n) {
  int64_t pairs = 0;
  for_each_span(n, [&](const Span& s) { pairs += (s.last_row - s.first_row) * (s.last_key - s.first_key); });
  return n.B * n.H * n.D * pairs;
}

MVAR_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

MVAR_INLINE float largest(Vec v) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad quads[kWidth / 4];
  __builtin_memcpy(quads, &v, sizeof v);
  Quad most = quads[0];
  for (int64_t i = 1; i < kWidth / 4; ++i) most = quads[i] > most ? quads[i] : most;
  const float a = most[0] > most[1] ? most[0] : most[1], b = most[2] > most[3] ? most[2] : most[3];
  return a > b ? a : b;
}

float temperature(const Sizes& n, int64_t h) {
  if (!n.log_temperature) return 1.0f;
  const float t = n.log_temperature[h];
  return __builtin_expf(t > kMaxLogTemperature ? kMaxLogTemperature : t);
}

MVAR_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int64_t i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// 1/‖x‖, from the sum of the squares. A norm below kNormEps counts as kNormEps; of squares whose sum is no float, 0.
MVAR_INLINE Vec inverse_norm(Vec squares) {
  const Vec x = larger(squares, splat(kNormEps * kNormEps));
  const Vec y = 1.0f / square_root(x);
  // Rounded once in all, not twice: scores up to 100 are multiplied by it. Newton's step, with x·y in
  // two parts.
  const Vec xy = x * y;
  const Vec lost = fma(x, y, -xy);
  const Vec error = fma(-xy, y, splat(1.0f)) - lost * y;
  return squares > splat(__FLT_MAX__) ? Vec{} : fma(0.5f * y, error, y);  // where y is 0, and x·y is not a number
}

template <typename Word, typename T>
MVAR_INLINE float inverse_norm(const T* row, int64_t D) {
  Vec squares{};
  for (int64_t d = 0; d < D; d += kWidth * Word::kDepth) {
    const Vec packed = load_words<Word>(row + d, D - d);
    squares = Word::multiply_add(packed, packed, squares);
  }
  return inverse_norm(splat(sum(squares)))[0];
}

// The same of a vector of columns.
template <typename Word>
MVAR_INLINE Vec inverse_norm(const Panels& columns, int64_t first) {
  Sum squares;  // slot by slot a part of the column
  for (int64_t w = 0; w < columns.depth; ++w) {
    const Vec packed = load(columns.at(w, first), All{});
    squares.slot[w % kSlots] = Word::multiply_add(packed, packed, squares.slot[w % kSlots]);
  }
  return inverse_norm((squares.slot[0] + squares.slot[1]) + (squares.slot[2] + squares.slot[3]));
}

// Rows that are rotated are divided by their lengths before.
MVAR_INLINE bool norms_are_factors(const Sizes& n) { return n.log_temperature && !n.cos; }

// A score is query_factor · (key_factor · q·k): the key's factor apart, as errors that all scores of a
// query share do not change its weights.
template <typename Word>
MVAR_INLINE Vec key_factors(const Sizes& n, const Panels& columns, int64_t first) {
  return norms_are_factors(n) ? inverse_norm<Word>(columns, first) : splat(1.0f);
}

template <typename Word, typename T>
MVAR_INLINE float query_factor(const Sizes& n, float temperature, const T* row) {
  const float factor = n.scale * temperature;
  return norms_are_factors(n) ? factor * inverse_norm<Word>(row, n.D) : factor;
}

// Rows whose factor is 0 are zeros: other products with them may be infinite, and 0 times that is not a number.
MVAR_INLINE void drop_columns(const Panels& columns, int64_t first, Vec factor) {
  if (largest(-factor) < 0.0f) return;
  for (int64_t w = 0; w < columns.depth; ++w) {
    float* words = columns.at(w, first);
    store(words, factor == 0.0f ? Vec{} : load(words, All{}), All{});
  }
}

// The factor for powers of 2. It is above 0, however small the scale: -∞ times it must stay -∞.
MVAR_INLINE float log2_factor(float query_factor) {
  const float factor = query_factor * kLog2E;
  return factor > kLeastFactor ? factor : kLeastFactor;
}

// offset[i]: what a score of the block's key i is moved by, 0, or -∞ for keys that only fill a vector
MVAR_INLINE void fill_offsets(float* offset, int64_t keys) {
  for (int64_t i = keys / kWidth * kWidth; i < round_up(keys, kWidth); ++i) {
    offset[i] = i < keys ? 0.0f : -__builtin_inff();
  }
  for (int64_t i = 0; i < keys / kWidth * kWidth; ++i) offset[i] = 0.0f;
}

// What scores are made of and where they go; all but `peaks` as in ForwardBuffers.
struct Scoring {
  const float* queries;
  Panels keys;
  const float *key_factor, *offset;
  float* scores;
  int64_t stride;
  float* peaks;
};

// A tile of queries · keys. Of floats each half of the elements has a sum of its own: scores up to 100 are
// in the exponent, and the rounding of the sums is most of a weight's error. It halves.
template <typename Word, int count>
MVAR_INLINE Tile<count> dot_products(const float* queries, const float* panel, int64_t depth) {
  const int64_t half = Word::kDepth == 1 ? depth / 2 : 0;
  if (!half) return multiply<Word, count>(queries, depth, 1, panel, depth);
  const Tile<count> first = multiply<Word, count>(queries, depth, 1, panel, half);
  Tile<count> all = multiply<Word, count>(queries + half, depth, 1, panel + half * kPanel, depth - half);
  for_each_of_tile<count>([&](auto r, auto v) MVAR_INLINE_LAMBDA { all.at[r][v] += first.at[r][v]; });
  return all;
}

// scores = key_factor · (the block's queries · keys first_key..); peaks = their maxima lane by lane
template <typename Word>
void score(const Scoring w, QueryBlock block, int64_t first_key, int64_t keys) {
  const int64_t depth = w.keys.depth;
  for_each_panel(keys, [&](int64_t column, auto vectors) MVAR_INLINE_LAMBDA {
    constexpr int count = decltype(vectors)::count;
    const float* panel = w.keys.at(0, first_key + column);
    const float* key_factor = w.key_factor + first_key + column;
    for (int64_t tile = 0; tile < block.rows; tile += kTileRows) {
      const Tile<count> s = dot_products<Word, count>(w.queries + tile * depth, panel, depth);
      float* scores = w.scores + tile * w.stride + column;
      float* peaks = w.peaks + tile * kWidth;
      unrolled<kTileRows>([&](auto r) MVAR_INLINE_LAMBDA {
        Vec most = column ? load(peaks + r * kWidth, All{}) : splat(-__builtin_inff());
        unrolled<count>([&](auto v) MVAR_INLINE_LAMBDA {
          const Vec offset = load(w.offset + column + v * kWidth, All{});
          const Vec scaled = fma(s.at[r][v], load(key_factor + v * kWidth, All{}), offset);
          store(scores + r * w.stride + v * kWidth, scaled, All{});
          most = larger(scaled, most);
        });
        store(peaks + r * kWidth, most, All{});
      });
    }
  });
}

// Prefetches a row that is read later.
template <typename T>
MVAR_INLINE void prefetch(const T* row, int64_t elements) {
  for (int64_t i = 0; i < elements; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + i, 0, 2);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
