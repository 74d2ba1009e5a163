// Top-k and top-p on one row, exact and without a sort.
//
// Logits become integers of the same order, their keys. Both filters look for the largest key such
// that what lies at or above it (a count of codes, a sum of weights) is at least so much, by narrowing an
// interval of keys: a pass of comparisons over a row in the first-level cache costs less than moving it.
#pragma once

#include "noise.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// Its own inverse. A logit of −0 must have become +0 before: they are equal.
MVAR_INLINE VecInt key_of(VecInt bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
MVAR_INLINE Vec logit_of(VecInt key) { return (Vec)key_of(key); }
MVAR_INLINE float logit_of(int64_t key) { return logit_of(splat_int((int32_t)key))[0]; }

constexpr int32_t kLowestKey = INT32_MIN;  // of padding
constexpr int32_t kRuledOut = (int32_t)0x807fffff;  // −∞
constexpr int32_t kSmallest = (int32_t)0x80800000, kLargest = 0x7f7fffff;  // of the finite ones

// What a row's logits count relative to: its largest, a finite number.
MVAR_INLINE float largest_logit(int32_t highest) {
  return logit_of((int64_t)(highest < kSmallest ? kSmallest : highest > kLargest ? kLargest : highest));
}

// The codes that are left, in order, and their keys; from `count` to the next full vector the keys are
// the lowest and the codes 0. Each array has room for a row's codes, rounded up to full vectors, and one
// vector more.
struct Row {
  int32_t *keys, *codes, *weights;
  int64_t count;
  int32_t lowest, highest;  // no key is outside of these
  bool unfiltered;          // nothing was dropped yet: codes are 0, 1, 2, … and not stored

  MVAR_INLINE float largest() const { return largest_logit(highest); }

  MVAR_INLINE void finish() {
    store_int(keys + count, splat_int(kLowestKey));
    store_int(codes + count, VecInt{});
  }

  MVAR_INLINE VecInt codes_at(int64_t i) const {
    return unfiltered ? lane_numbers() + (int32_t)i : load_int(codes + i);
  }

  // Keep the codes with keys of at least `threshold`.
  void cut(int32_t threshold) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecInt key = load_int(keys + i), code = codes_at(i);
      const uint32_t bits = bits_of(key >= threshold);
      compress(keys + left, key, bits);
      compress(codes + left, code, bits);
      left += __builtin_popcount(bits);
    }
    count = left;
    finish();
    lowest = threshold;
    unfiltered = false;
  }

  // Drop the first `dropped` codes whose key is the lowest.
  void drop_ties(int64_t dropped) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (keys[i] == lowest && dropped-- > 0) continue;
      keys[left] = keys[i];
      codes[left++] = codes[i];
    }
    count = left;
    finish();
  }
};

// How much lies at or above a key, and the keys on either side of that cut.
struct Above {
  int64_t amount;
  int32_t next_below, next_above;
};

struct Sides {
  VecInt below = splat_int(INT32_MIN), above = splat_int(INT32_MAX);
  MVAR_INLINE void add(VecInt key, VecInt is_above) {
    below = larger(below, is_above ? splat_int(INT32_MIN) : key);
    above = smaller(above, is_above ? key : splat_int(INT32_MAX));
  }
};

inline Above count_above(const Row& row, int32_t key) {
  VecInt count{};
  Sides sides;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const VecInt keys = load_int(row.keys + i);
    const VecInt is_above = keys >= key;
    count -= is_above;
    sides.add(keys, is_above);
  }
  return {sum(count), largest(sides.below), smallest(sides.above)};
}

// Two weights to a lane of 64 bits.
struct WeightSum {
  VecWide even{}, odd{};
  MVAR_INLINE void add(VecInt weights) {
    even += (VecWide)weights & kLow32;
    odd += (VecWide)weights >> 32;
  }
  MVAR_INLINE int64_t total() const { return (int64_t)sum(even + odd); }
};

inline Above weigh_above(const Row& row, int32_t key) {
  WeightSum weight;
  Sides sides;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const VecInt keys = load_int(row.keys + i);
    const VecInt is_above = keys >= key;
    weight.add(load_int(row.weights + i) & is_above);
    sides.add(keys, is_above);
  }
  return {weight.total(), largest(sides.below), smallest(sides.above)};
}

struct Threshold {
  int32_t key;
  int64_t above;  // how much lies at or above it
};

// Near enough to the logarithm of an integer, in a unit of its own: the bits of the float.
MVAR_INLINE float logarithm(int64_t amount) {
  const float value = (float)amount;
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return (float)bits;
}

// The largest of the row's keys with at least `need` at or above it. `measure` is count_above or
// weigh_above; `total` is what it finds in the row, `least` what it finds for the highest key or less.
//
// Each cut narrows the interval of keys: it is made where `need` would lie if the logarithm of the amount
// fell on a straight line between the logits, or, every eighth time, in the middle of the keys, which
// bounds the number of cuts.
template <typename Measure>
Threshold largest_threshold(const Row& row, int64_t total, int64_t need, int64_t least, Measure measure) {
  int64_t lowest = row.lowest, highest = row.highest;
  int64_t at_lowest = total, at_highest = least;
  for (int step = 0; lowest < highest; ++step) {
    int64_t cut = lowest + (highest - lowest + 1) / 2;
    if (step % 8 != 7) {
      float part = (logarithm(at_lowest) - logarithm(need)) / (logarithm(at_lowest) - logarithm(at_highest));
      // Too near to one end, the other end would never move: go beyond.
      part = part < 0.1f ? 3 * part : part > 0.9f ? 3 * part - 2 : part;
      const float low = logit_of(lowest);
      const float guess = low + part * (logit_of(highest) - low);
      if (guess == guess) cut = key_of((VecInt)splat(guess))[0];
    }
    cut = cut <= lowest ? lowest + 1 : cut > highest ? highest : cut;
    const Above found = measure(row, (int32_t)cut);
    if (found.amount >= need) {
      lowest = found.next_above;
      at_lowest = found.amount;
    } else {
      highest = found.next_below;
      at_highest = found.amount;
    }
  }
  return {(int32_t)lowest, at_lowest};
}

inline int64_t count_at_least(const Row& row, int32_t key) {
  VecInt count{};
  for (int64_t i = 0; i < row.count; i += kWidth) count -= load_int(row.keys + i) >= key;
  return sum(count);
}

// A first cut, from a sample, that leaves few more than k: the others need not be looked at again.
inline void cut_roughly(Row& row, int64_t k) {
  constexpr int64_t kOneIn = 16;  // vectors
  Row sample = row;
  sample.keys = row.weights;
  sample.count = 0;
  for (int64_t i = 0; i + kWidth <= row.count; i += kOneIn * kWidth) {
    store_int(sample.keys + sample.count, load_int(row.keys + i));
    sample.count += kWidth;
  }
  const float expected = (float)k * (float)sample.count / (float)row.count;
  const int64_t need = (int64_t)(expected + 2.5f * __builtin_sqrtf(expected)) + 1;
  if (need >= sample.count) return;
  const int32_t key = largest_threshold(sample, sample.count, need, 1, count_above).key;
  if (count_at_least(row, key) >= k) row.cut(key);
}

// Keeps every logit ≥ the k-th largest.
inline void keep_top_k(Row& row, int64_t k) {
  if (k == 1) return row.cut(row.highest);
  cut_roughly(row, k);
  row.cut(largest_threshold(row, row.count, k, 1, count_above).key);
}

// Weights in multiples of 2⁻³⁰ of the largest; their sum.
inline int64_t weigh(Row& row) {
  const Vec largest = splat(row.largest());
  WeightSum weight;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const VecInt weights = to_int(exp_negative(logit_of(load_int(row.keys + i)) - largest) * 0x1p30f);
    store_int(row.weights + i, weights);
    weight.add(weights);
  }
  return weight.total();
}

// In ascending order, equal logits in the order of their codes, drops while the sum of the weights is
// at most (1−p) of the total, but never the last.
inline void keep_top_p(Row& row, double top_p) {
  const int64_t total = weigh(row);
  if (total == 0) {  // all are ruled out
    row.cut(row.highest);
    row.drop_ties(row.count - 1);
    return;
  }
  const int64_t limit = (int64_t)__builtin_floor((double)total * (1.0 - top_p));
  // The last code weighs more than 1: below the total it is never dropped.
  const int64_t most = limit < total ? limit : total - 1;
  const Threshold threshold = largest_threshold(row, total, total - most, 1 << 30, weigh_above);
  const int64_t spare = most - (total - threshold.above);
  const int64_t weight =
      to_int(exp_negative(splat(logit_of(threshold.key)) - splat(row.largest())) * 0x1p30f)[0];
  row.cut(threshold.key);
  if (spare >= weight) row.drop_ties(spare / weight);
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
