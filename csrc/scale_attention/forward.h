// The forward pass: softmax over blocks of keys with a running maximum, in units of log 2.
#pragma once

#include "common/exp.h"
#include "rotary.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Tokens. As many as the largest scale at 256×256: its keys are all read before its first queries.
constexpr int64_t kAhead = 256;

// What a thread works in: the packed keys and values of a head, and one block of queries.
template <typename Word>
struct ForwardBuffers {
  Panels keys;          // columns: keys, depth: D
  Panels values;        // columns: D, depth: keys
  float* key_factor;    // (keys)
  float* offset;        // (kKeyBlock)
  float* queries;       // (kQueryBlock, words of D)
  float* query_factor;  // (kQueryBlock), for powers of 2
  float* scores;        // (kQueryBlock, kScoreStride), then weights, as words of the key dimension
  float* peaks;         // (kQueryBlock, kWidth): lane by lane the largest scores
  float* maximum;       // (kQueryBlock): largest score of the key blocks so far; so are the next two
  float* total;         // (kQueryBlock): sum of the weights
  float* sums;          // (kQueryBlock, columns): weighted sums of values
  float* correction;    // (kQueryBlock): what earlier sums are multiplied by
  int64_t columns;      // D in whole vectors
  RotaryBuffers rotary;

  ForwardBuffers(Carver& carver, const Sizes& n) : rotary(carver, n) {
    const int64_t most = most_keys(n);
    columns = round_up(n.D, kWidth);
    keys = {carver.take(panel_floats(words<Word>(n.D), most)), words<Word>(n.D)};
    values = {carver.take(panel_floats(words<Word>(most), n.D)), words<Word>(most)};
    key_factor = carver.take(round_up(most, kPanel));
    offset = carver.take(kKeyBlock);
    queries = carver.take(kQueryBlock * words<Word>(n.D));
    query_factor = carver.take(kQueryBlock);
    scores = carver.take(kQueryBlock * kScoreStride);
    peaks = carver.take(kQueryBlock * kWidth);
    maximum = carver.take(kQueryBlock);
    total = carver.take(kQueryBlock);
    sums = carver.take(kQueryBlock * columns);
    correction = carver.take(kQueryBlock);
  }
};

// Keys and values first..last of the span's keys, `first` a multiple of the vector width.
template <typename T, typename Word>
void pack_keys(ForwardBuffers<Word>& w, const ScaleAttentionForward& a, const Sizes& n, Head at,
               int64_t span_start, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kWidth) {
    const int64_t rows = smaller(kWidth, last - i);
    const Rows<T> key = multiplied_rows<T>(w.rotary, a.k, n, at, span_start + i, rows);
    const Rows<T> value{row<T>(a.v, at.b, span_start + i, at.h), a.v.row_stride};
    pack_columns<Word>(w.keys, i, rows, key, n.D);
    for (int64_t j = 0; j < rows; j += Word::kDepth) {
      const T* second = j + 1 < rows ? value(j + 1) : nullptr;
      pack_word<Word>(w.values, (i + j) / Word::kDepth, value(j), second, n.D);
    }
    const Vec factor = key_factors<Word>(n, w.keys, i);
    store(w.key_factor + i, factor, All{});
    drop_columns(w.keys, i, factor);
  }
}

template <typename T, typename Word>
void begin_queries(ForwardBuffers<Word>& w, const ScaleAttentionForward& a, const Sizes& n, Head at,
                   QueryBlock block) {
  const int64_t depth = words<Word>(n.D);
  const float heat = temperature(n, at.h);
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* q = multiplied_rows<T>(w.rotary, a.q, n, at, block.first + r, 1, n.L - n.Lq)(0);
    pack_row<Word>(w.queries + r * depth, q, n.D);
    const float factor = query_factor<Word>(n, heat, q);
    if (factor == 0.0f) __builtin_memset(w.queries + r * depth, 0, depth * sizeof(float));
    w.query_factor[r] = log2_factor(factor);
    w.maximum[r] = -__builtin_inff();
    w.total[r] = 0.0f;
  }
  __builtin_memset(w.sums, 0, block.tiled_rows() * w.columns * sizeof(float));
  // Rows that only fill a tile: anything finite will do.
  for (int64_t r = block.rows; r < block.tiled_rows(); ++r) {
    __builtin_memset(w.queries + r * depth, 0, depth * sizeof(float));
    w.correction[r] = 0.0f;
  }
}

MVAR_INLINE void store_weights(Single, float* row, int64_t key, Vec p) { store(row + key, p, All{}); }
#if defined(__AVX512BF16__)
MVAR_INLINE void store_weights(Pair, float* row, int64_t key, Vec p) { store((bf16*)row + key, p, All{}); }
#endif

// Scores become weights, in place: share · 2^(query_factor · (score − maximum)). The difference comes first: of
// scores of 1e10 the product's rounding alone is hundreds, and would make exponents positive.
template <typename Word>
void weigh(ForwardBuffers<Word>& w, QueryBlock block, int64_t keys, float share) {
  for (int64_t r = 0; r < block.rows; ++r) {
    float* scores = w.scores + r * kScoreStride;
    const float before = w.maximum[r];
    const float peak = largest(load(w.peaks + r * kWidth, All{}));
    const float maximum = peak > before ? peak : before;
    const Vec factor = splat(w.query_factor[r]), most = splat(maximum);
    Sum total;
    for_each_vector(round_up(keys, kWidth), [&](int64_t c, auto, int slot) MVAR_INLINE_LAMBDA {
      const Vec p = exp2((load(scores + c, All{}) - most) * factor) * share;
      total.slot[slot] += p;
      store_weights(Word{}, scores, c, p);
    });
    w.correction[r] = exp2(splat(before - maximum) * factor)[0];
    w.total[r] = w.total[r] * w.correction[r] + total.total();
    w.maximum[r] = maximum;
  }
}

// sums = correction · sums + weights · values first_key..
template <typename Word>
void add_values(const ForwardBuffers<Word>& w, QueryBlock block, int64_t first_key, int64_t keys, int64_t D) {
  const int64_t columns = w.columns, depth = words<Word>(keys);
  for_each_panel(D, [&](int64_t column, auto vectors) MVAR_INLINE_LAMBDA {
    constexpr int count = decltype(vectors)::count;
    const float* panel = w.values.at(first_key / Word::kDepth, column);
    for (int64_t tile = 0; tile < block.rows; tile += kTileRows) {
      const Tile<count> s = multiply<Word, count>(w.scores + tile * kScoreStride, kScoreStride, 1, panel, depth);
      float* sums = w.sums + tile * columns + column;
      unrolled<kTileRows>([&](auto r) MVAR_INLINE_LAMBDA {
        const Vec correction = broadcast(w.correction + tile + r);
        unrolled<count>([&](auto v) MVAR_INLINE_LAMBDA {
          float* out = sums + r * columns + v * kWidth;
          store(out, fma(load(out, All{}), correction, s.at[r][v]), All{});
        });
      });
    }
  });
}

template <typename T, typename Word>
void finish_queries(const ForwardBuffers<Word>& w, const ScaleAttentionForward& a, const Sizes& n, Head at,
                    QueryBlock block, float share) {
  float* lse = a.lse + (at.b * n.H + at.h) * n.Lq + block.first;
  for (int64_t r = 0; r < block.rows; ++r) {
    T* out = row<T>(a.out, at.b, block.first + r, at.h);
    const float* sums = w.sums + r * w.columns;
    const Vec inverse = splat(w.total[r] == 0.0f ? 0.0f : 1.0f / w.total[r]);  // 0 without keys
    for_each_vector(n.D, [&](int64_t d, auto lanes, int) MVAR_INLINE_LAMBDA {
      store(out + d, load(sums + d, lanes) * inverse, lanes);
    });
    lse[r] = w.maximum[r] * w.query_factor[r] * kLog2 + __builtin_logf(w.total[r] / share);
  }
}

// Prefetches q, k and v of the tokens that come kAhead after a block's, in this head or those after it: the rows of a
// head are too far apart for the hardware. Inlined, or the compiler takes it for a function that does nothing.
template <typename T>
MVAR_INLINE void prefetch_ahead(const ScaleAttentionForward& a, const Sizes& n, Head at, QueryBlock block) {
  const int64_t first_row = n.L - n.Lq;
  if (first_row < 0) return;
  int64_t token = first_row + block.first + kAhead;
  const int64_t head = at.b * n.H + at.h + token / n.L;
  token %= n.L;
  Head ahead{head / n.H, head % n.H};
  for (int64_t r = 0; r < block.rows && ahead.b < n.B; ++r) {
    prefetch(row<T>(a.k, ahead.b, token, key_head(n, ahead).h), n.D);
    prefetch(row<T>(a.v, ahead.b, token, key_head(n, ahead).h), n.D);
    if (token >= first_row) prefetch(row<T>(a.q, ahead.b, token - first_row, ahead.h), n.D);
    if (++token == n.L) {
      token = 0;
      if (++ahead.h == n.H) ahead = {ahead.b + 1, 0};
    }
  }
}

// One head's query blocks number part, part + parts, … : any share of them gives the same bits.
template <typename T, typename Word>
void forward_part(ForwardBuffers<Word>& w, const ScaleAttentionForward& a, const Sizes& n, Head at, int64_t part,
                  int64_t parts) {
  // A power of 2, so that weights of all keys add up to at most 1, and weighted sums stay in the values' range.
  float share = 1.0f;
  for (int64_t most = most_keys(n); most > 1; most = (most + 1) / 2) share *= 0.5f;
  int64_t packed = 0, number = 0;
  for_each_span(n, [&](const Span& span) {
    if (span.opens) packed = 0;
    const int64_t keys = seen_keys(n, span, at.b);
    for (int64_t first = span.first_row; first < span.last_row; first += kQueryBlock, ++number) {
      if (number % parts != part) continue;
      // The last vector of keys may have been packed before all of them were to be seen.
      if (packed < keys) pack_keys<T>(w, a, n, key_head(n, at), span.first_key, packed / kWidth * kWidth, keys);
      packed = keys;
      const QueryBlock block{first, smaller(kQueryBlock, span.last_row - first)};
      begin_queries<T>(w, a, n, at, block);
      prefetch_ahead<T>(a, n, at, block);
      for (int64_t key = 0; key < keys; key += kKeyBlock) {
        const int64_t count = smaller(kKeyBlock, keys - key);
        fill_offsets(w.offset, count);
        score<Word>({w.queries, w.keys, w.key_factor, w.offset, w.scores, kScoreStride, w.peaks}, block, key, count);
        weigh(w, block, count, share);
        add_values(w, block, key, count, n.D);
      }
      finish_queries<T>(w, a, n, at, block, share);
    }
  });
}

// Into how many parts a head is cut: the fewest that give every thread as many, and none where the
// heads are many, as each part packs the keys again.
int64_t parts_of_a_head(int64_t heads) {
  int64_t divisor = heads, rest = threads();
  if (heads >= 4 * rest) return 1;
  while (rest) {
    const int64_t remainder = divisor % rest;
    divisor = rest;
    rest = remainder;
  }
  return threads() / divisor;
}

template <typename T>
int64_t forward_workspace(const Sizes& n) {
  Carver carver(nullptr);
  ForwardBuffers<typename WordOf<T>::Word>(carver, n);
  return threads() * carver.needed();
}

template <typename T>
void forward(const ScaleAttentionForward& a, const Sizes& n, float* workspace) {
  const int64_t parts = parts_of_a_head(n.B * n.H);
  const int64_t share = forward_workspace<T>(n) / threads();
#pragma omp parallel if (multiplications(n) > kParallelMultiplications)
  {
    Carver carver(workspace + this_thread() * share);
    ForwardBuffers<typename WordOf<T>::Word> buffers(carver, n);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n.B * n.H * parts; ++i) {
      forward_part<T>(buffers, a, n, {i / parts / n.H, i / parts % n.H}, i % parts, parts);
    }
  }
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
