// The backward pass. With p the weights, δ = Σ p · (grad·v) of a query, and w = p · (grad·v − δ) · (what
// q·k is multiplied by), the gradient of q·k:
//
//     dv = pᵀ grad,   dq = w k,   dk = wᵀ q
//
// With normalised q and k what remains is to take from dq its part along q, and from dk its part along
// k. The gradient of the log-temperature is Σ p · (grad·v − δ) · score.
//
// A block of queries keeps its whole rows of scores, up to a few MB. So p and δ are recomputed as
// accurately as the forward had them: from the log-sum-exp, rounded at the size of the scores, or from
// the rounded output they would be known less well than the scores themselves.
//
// A head is one thread's, and its sums run in the order of its query blocks.
#pragma once

#include "common/exp.h"
#include "rotary.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// What a thread works in. All words are floats; `columns` is D in whole vectors.
struct BackwardBuffers {
  int64_t columns, stride;
  Panels key_columns, value_columns;  // columns: keys, depth: D
  Panels key_rows;                    // columns: D, depth: keys
  float *key_factor, *offset;         // (keys)
  float *queries, *grads;             // (kQueryBlock, D)
  Panels query_rows, grad_rows;       // columns: D, depth: queries; grad_rows divided by `total`
  float* query_factor;                // (kQueryBlock)
  float* scores;                      // (kQueryBlock, stride), then weights times their total
  float* dweights;                    // (kQueryBlock, stride): grad·v, then the gradient of q·k
  float* peaks;                       // (kQueryBlock, kWidth): lane by lane the largest scores
  float* dq;                          // (kQueryBlock, columns)
  float *dk, *dv;                     // (keys, columns)
  RotaryBuffers rotary;

  BackwardBuffers(Carver& carver, const Sizes& n) : rotary(carver, n) {
    const int64_t most = most_keys(n);
    columns = round_up(n.D, kWidth);
    stride = score_stride(most);
    key_columns = {carver.take(panel_floats(n.D, most)), n.D};
    value_columns = {carver.take(panel_floats(n.D, most)), n.D};
    key_rows = {carver.take(panel_floats(most, n.D)), most};
    key_factor = carver.take(round_up(most, kPanel));
    offset = carver.take(round_up(most, kPanel));
    queries = carver.take(kQueryBlock * n.D);
    grads = carver.take(kQueryBlock * n.D);
    query_rows = {carver.take(panel_floats(kQueryBlock, n.D)), kQueryBlock};
    grad_rows = {carver.take(panel_floats(kQueryBlock, n.D)), kQueryBlock};
    query_factor = carver.take(kQueryBlock);
    scores = carver.take(kQueryBlock * stride);
    dweights = carver.take(kQueryBlock * stride);
    peaks = carver.take(kQueryBlock * kWidth);
    dq = carver.take(kQueryBlock * columns);
    dk = carver.take(most * columns);
    dv = carver.take(most * columns);
  }
};

template <typename T>
void pack_keys(BackwardBuffers& w, const ScaleAttentionBackward& a, const Sizes& n, Head at, int64_t span_start,
               int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kWidth) {
    const int64_t rows = smaller(kWidth, last - i);
    const Rows<T> key = multiplied_rows<T>(w.rotary, a.k, n, at, span_start + i, rows);
    const Rows<T> value{row<T>(a.v, at.b, span_start + i, at.h), a.v.row_stride};
    pack_columns<Single>(w.key_columns, i, rows, key, n.D);
    pack_columns<Single>(w.value_columns, i, rows, value, n.D);
    for (int64_t j = 0; j < rows; ++j) pack_word<Single, T>(w.key_rows, i + j, key(j), nullptr, n.D);
    const Vec factor = key_factors<Single>(n, w.key_columns, i);
    store(w.key_factor + i, factor, All{});
    drop_columns(w.key_columns, i, factor);
  }
}

template <typename T>
void begin_queries(BackwardBuffers& w, const ScaleAttentionBackward& a, const Sizes& n, Head at, QueryBlock block) {
  const float heat = temperature(n, at.h);
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* q = multiplied_rows<T>(w.rotary, a.q, n, at, block.first + r, 1, n.L - n.Lq)(0);
    const T* grad = row<T>(a.grad_out, at.b, block.first + r, at.h);
    pack_row<Single>(w.queries + r * n.D, q, n.D);
    pack_row<Single>(w.grads + r * n.D, grad, n.D);
    pack_word<Single, T>(w.query_rows, r, q, nullptr, n.D);
    const float factor = w.query_factor[r] = query_factor<Single>(n, heat, q);
    if (factor == 0.0f) __builtin_memset(w.queries + r * n.D, 0, n.D * sizeof(float));
  }
  // Rows that only fill a tile: anything finite will do.
  const int64_t fill = block.tiled_rows() - block.rows;
  __builtin_memset(w.queries + block.rows * n.D, 0, fill * n.D * sizeof(float));
  __builtin_memset(w.grads + block.rows * n.D, 0, fill * n.D * sizeof(float));
  __builtin_memset(w.dq, 0, block.tiled_rows() * w.columns * sizeof(float));
}

// dweights = the block's gradients · values
void differentiate_weights(const BackwardBuffers& w, QueryBlock block, int64_t keys, int64_t D) {
  const int64_t stride = w.stride;
  for_each_panel(keys, [&](int64_t column, auto vectors) MVAR_INLINE_LAMBDA {
    constexpr int count = decltype(vectors)::count;
    for (int64_t tile = 0; tile < block.rows; tile += kTileRows) {
      const Tile<count> t = multiply<Single, count>(w.grads + tile * D, D, 1, w.value_columns.at(0, column), D);
      float* out = w.dweights + tile * stride + column;
      for_each_of_tile<count>([&](auto r, auto v) MVAR_INLINE_LAMBDA {
        store(out + r * stride + v * kWidth, t.at[r][v], All{});
      });
    }
  });
}

// Scores become weights times their total, and dweights the gradient of q·k; grad_rows are filled. Returns
// the gradient of the log-temperature from these queries.
double differentiate_softmax(BackwardBuffers& w, QueryBlock block, int64_t keys, int64_t D) {
  double dlog_temperature = 0.0;
  for (int64_t r = 0; r < block.rows; ++r) {
    float* scores = w.scores + r * w.stride;
    float* dweights = w.dweights + r * w.stride;
    const Vec factor = splat(log2_factor(w.query_factor[r]));
    const Vec most = splat(largest(load(w.peaks + r * kWidth, All{})));
    // The difference first, as in the forward; where 2^score is 0 it is kept finite, as 0 is multiplied by it.
    const auto score_at = [&](int64_t c, auto lanes) MVAR_INLINE_LAMBDA {
      return larger((load(scores + c, lanes) - most) * factor, splat(kLeastScore));
    };
    Sum totals, products, scored;
    for_each_vector(keys, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
      const Vec score = score_at(c, lanes);
      const Vec p = keep(exp2(score), lanes);
      totals.slot[slot] += p;
      products.slot[slot] = fma(p, load(dweights + c, lanes), products.slot[slot]);
      scored.slot[slot] = fma(p, score, scored.slot[slot]);
    });
    const float total = totals.total();
    const Vec delta = splat(products.total() / total), inverse = splat(1.0f / total);
    // Less their mean the scores are small, and what δ was rounded by cancels.
    const Vec mean = splat(scored.total() / total);
    const Vec scale = splat(w.query_factor[r]) * inverse;
    Sum along;
    for_each_vector(keys, [&](int64_t c, auto lanes, int slot) MVAR_INLINE_LAMBDA {
      const Vec score = score_at(c, lanes);
      const Vec p = exp2(score);
      const Vec change = p * (load(dweights + c, lanes) - delta);
      along.slot[slot] = fma(keep(change, lanes), score - mean, along.slot[slot]);
      store(scores + c, p, lanes);
      store(dweights + c, change * scale * load(w.key_factor + c, lanes), lanes);
    });
    // Of a factor too small for powers of 2 the scores are those of the least one: 0 where the factor is.
    const float true_part = w.query_factor[r] * kLog2E / factor[0];
    dlog_temperature += kLog2 * true_part * along.total() / total;
    for (int64_t d = 0; d < D; d += kWidth) {
      store(w.grad_rows.at(r, d), load_words<Single>(w.grads + r * D + d, D - d) * inverse, All{});
    }
  }
  return dlog_temperature;
}

// out(i, :) += Σ_j left(i, j) · right(j, :) for i < rows and j < depth, the words `first`.. of right
MVAR_INLINE void add_product(float* out, int64_t columns, const float* left, int64_t left_row, int64_t left_step,
                             int64_t rows, const Panels& right, int64_t first, int64_t depth) {
  for_each_panel(columns, [&](int64_t column, auto vectors) MVAR_INLINE_LAMBDA {
    constexpr int count = decltype(vectors)::count;
    for (int64_t tile = 0; tile < rows; tile += kTileRows) {
      const Tile<count> t =
          multiply<Single, count>(left + tile * left_row, left_row, left_step, right.at(first, column), depth);
      float* sums = out + tile * columns + column;
      for_each_of_tile<count>([&](auto r, auto v) MVAR_INLINE_LAMBDA {
        float* sum = sums + r * columns + v * kWidth;
        if (tile + r < rows) store(sum, load(sum, All{}) + t.at[r][v], All{});
      });
    }
  });
}

void add_gradients(BackwardBuffers& w, QueryBlock block, int64_t keys) {
  add_product(w.dv, w.columns, w.scores, 1, w.stride, keys, w.grad_rows, 0, block.rows);
  add_product(w.dk, w.columns, w.dweights, 1, w.stride, keys, w.query_rows, 0, block.rows);
  for (int64_t key = 0; key < keys; key += kKeyBlock) {
    add_product(w.dq, w.columns, w.dweights + key, w.stride, 1, block.rows, w.key_rows, key,
                smaller(kKeyBlock, keys - key));
  }
}

// out = d, or what of d is orthogonal to x where x was normalised, that is multiplied by 1/‖x‖.
template <typename T>
MVAR_INLINE void finish_row(T* out, const float* d, const T* x, bool normed, int64_t D) {
  float along = 0.0f;
  if (normed) {
    Sum products, squares;
    for_each_vector(D, [&](int64_t i, auto lanes, int slot) MVAR_INLINE_LAMBDA {
      const Vec value = load(x + i, lanes);
      products.slot[slot] = fma(value, load(d + i, lanes), products.slot[slot]);
      squares.slot[slot] = fma(value, value, squares.slot[slot]);
    });
    // Below kNormEps it was divided by a constant, and above the largest float by infinity.
    const float square = squares.total();
    along = square < kNormEps * kNormEps || square > __FLT_MAX__ ? 0.0f : products.total() / square;
  }
  for_each_vector(D, [&](int64_t i, auto lanes, int) MVAR_INLINE_LAMBDA {
    store(out + i, fma(splat(-along), load(x + i, lanes), load(d + i, lanes)), lanes);
  });
}

template <typename T>
MVAR_INLINE void fill_zeros(T* row, int64_t D) {
  for_each_vector(D, [&](int64_t d, auto lanes, int) MVAR_INLINE_LAMBDA { store(row + d, Vec{}, lanes); });
}

template <typename T>
void finish_queries(const BackwardBuffers& w, const ScaleAttentionBackward& a, const Sizes& n, Head at,
                    QueryBlock block) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t l = block.first + r;
    const T* q = row<T>(a.q, at.b, l, at.h);
    const float* dq = w.dq + r * w.columns;
    if (n.cos) dq = rotate_back(dq, q, w.rotary, n, n.L - n.Lq + l);
    finish_row(row<T>(a.dq, at.b, l, at.h), dq, q, n.log_temperature, n.D);
  }
}

template <typename T>
void finish_keys(const BackwardBuffers& w, const ScaleAttentionBackward& a, const Sizes& n, Head at,
                 const Span& span, int64_t keys) {
  for (int64_t l = span.first_key + keys; l < span.last_key; ++l) {
    fill_zeros(row<T>(a.dk, at.b, l, at.h), n.D);
    fill_zeros(row<T>(a.dv, at.b, l, at.h), n.D);
  }
  for (int64_t l = span.first_key; l < span.first_key + keys; ++l) {
    const int64_t i = (l - span.first_key) * w.columns;
    const T* k = row<T>(a.k, at.b, l, at.h);
    const float* dk = w.dk + i;
    if (n.cos) dk = rotate_back(dk, k, w.rotary, n, l);
    finish_row(row<T>(a.dk, at.b, l, at.h), dk, k, n.log_temperature, n.D);
    T* dv = row<T>(a.dv, at.b, l, at.h);
    for_each_vector(n.D, [&](int64_t d, auto lanes, int) MVAR_INLINE_LAMBDA {
      store(dv + d, load(w.dv + i + d, lanes), lanes);
    });
  }
}

// A head of keys and values, with all heads of q that share it. parts: of each of these the gradient of its
// log-temperature, from this sample.
template <typename T>
void backward_head(BackwardBuffers& w, const ScaleAttentionBackward& a, const Sizes& n, Head at, double* parts) {
  int64_t packed = 0;
  for (int64_t i = 0; i < n.group; ++i) parts[i] = 0.0;
  for_each_span(n, [&](const Span& span) {
    const int64_t keys = seen_keys(n, span, at.b);
    if (span.opens) packed = 0;
    // The last vector of keys was packed before all of them were there.
    pack_keys<T>(w, a, n, at, span.first_key, packed / kWidth * kWidth, keys);
    __builtin_memset(w.dk + packed * w.columns, 0, (keys - packed) * w.columns * sizeof(float));
    __builtin_memset(w.dv + packed * w.columns, 0, (keys - packed) * w.columns * sizeof(float));
    packed = keys;
    fill_offsets(w.offset, keys);
    for (int64_t i = 0; i < n.group; ++i) {
      const Head of_q{at.b, at.h * n.group + i};
      for (int64_t l = span.first_row; !keys && l < span.last_row; ++l) fill_zeros(row<T>(a.dq, at.b, l, of_q.h), n.D);
      for (int64_t first = span.first_row; keys && first < span.last_row; first += kQueryBlock) {
        const QueryBlock block{first, smaller(kQueryBlock, span.last_row - first)};
        begin_queries<T>(w, a, n, of_q, block);
        score<Single>({w.queries, w.key_columns, w.key_factor, w.offset, w.scores, w.stride, w.peaks}, block, 0, keys);
        differentiate_weights(w, block, keys, n.D);
        parts[i] += differentiate_softmax(w, block, keys, n.D);
        add_gradients(w, block, keys);
        finish_queries<T>(w, a, n, of_q, block);
      }
    }
    if (span.closes) finish_keys<T>(w, a, n, at, span, keys);
  });
}

int64_t backward_share(const Sizes& n) {
  Carver carver(nullptr);
  BackwardBuffers(carver, n);
  return carver.needed();
}

// Before the threads' shares: a double for each sample and head.
int64_t backward_workspace(const Sizes& n) { return 2 * n.B * n.H + 16 + threads() * backward_share(n); }

// The samples' parts in order. At the bound of the temperature its gradient passes, as torch's clamp does.
void sum_temperature(const ScaleAttentionBackward& a, const Sizes& n, const double* parts) {
  for (int64_t h = 0; h < n.H; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < n.B; ++b) sum += parts[b * n.H + h];
    a.dlog_temperature[h] = n.log_temperature[h] <= kMaxLogTemperature ? (float)sum : 0.0f;
  }
}

template <typename T>
void backward(const ScaleAttentionBackward& a, const Sizes& n, float* workspace) {
  Carver carver(workspace);
  double* parts = (double*)carver.take(2 * n.B * n.H);
  float* shares = carver.memory + carver.floats;
  const int64_t share = backward_share(n), key_heads = n.H / n.group;
#pragma omp parallel if (multiplications(n) > kParallelMultiplications)
  {
    Carver own(shares + this_thread() * share);
    BackwardBuffers buffers(own, n);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n.B * key_heads; ++i) {
      backward_head<T>(buffers, a, n, {i / key_heads, i % key_heads}, parts + i * n.group);
    }
  }
  if (n.log_temperature) sum_temperature(a, n, parts);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
