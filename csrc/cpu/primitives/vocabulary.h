// The sweep over one row's vocabulary that the loss operators share: fixed blocks of columns, each
// reduced on its own and merged in order by common/online_softmax.h. A block is read from memory
// once and stays in the nearest caches for its second look (maxima first, exponentials after) while
// the next block is fetched behind it.
//
// The block size is a constant, so a row's result does not depend on how many rows, neighbours or
// threads there are.
#pragma once

#include "common/online_softmax.h"
#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"
#include "cpu/primitives/simd.h"

namespace tokcore {
namespace TOKCORE_ISA {

template <typename T>
struct VecOf {
  using Type = FloatVec;
};
template <>
struct VecOf<double> {
  using Type = DoubleVec;
};
template <typename T>
using Vec = typename VecOf<T>::Type;
template <typename T>
using Acc = typename Vec<T>::Scalar;
template <typename T>
constexpr int kUnit = 2 * Vec<T>::kWidth;  // entries that one step of a sweep takes

template <typename T>
constexpr Acc<T> kLowest = -std::numeric_limits<Acc<T>>::infinity();

// The unit at x of which `left` entries exist; -inf stands for the others.
template <typename T>
TOKCORE_INLINE void load_unit(const T* x, int64_t left, Vec<T>& a, Vec<T>& b) {
  if (left >= kUnit<T>) return load2(x, a, b);
  T part[kUnit<T>];
  for (int i = 0; i < kUnit<T>; ++i) {
    if (i < left)
      part[i] = x[i];
    else
      from_acc(kLowest<T>, &part[i]);
  }
  load2(part, a, b);
}

template <typename T>
TOKCORE_INLINE void store_unit(T* out, int64_t left, bool stream, Vec<T> a, Vec<T> b) {
  if (left >= kUnit<T>) return stream ? stream2(out, a, b) : store2(out, a, b);
  T part[kUnit<T>];
  store2(part, a, b);
  for (int i = 0; i < left; ++i) out[i] = part[i];
}

// A prefetch never faults, so running past the end of the row is harmless.
template <typename T>
TOKCORE_INLINE void prefetch_next_block(const T* x) {
  __builtin_prefetch(x + kBlockColumns);
  if (kUnit<T> * sizeof(T) > 64) __builtin_prefetch(x + kBlockColumns + kUnit<T> / 2);
}

template <typename T>
TOKCORE_INLINE Acc<T> block_max(const T* x, int64_t n) {
  Vec<T> top_a = Vec<T>::all(kLowest<T>), top_b = top_a, a, b;
  for (int64_t j = 0; j < n; j += kUnit<T>) {
    load_unit(x + j, n - j, a, b);
    top_a = max_number(a, top_a);
    top_b = max_number(b, top_b);
  }
  return reduce_max(max_number(top_a, top_b));
}

// A block without a finite entry is anchored at 0: its exponentials are then all 0, or NaN where an
// entry is NaN.
template <typename S>
TOKCORE_INLINE S anchor_of(S max) {
  return max == -std::numeric_limits<S>::infinity() ? S(0) : max;
}

template <typename V>
TOKCORE_INLINE V positive_only(V weight, V product) {
  return select(V::all(0) < weight, product, V::all(0));
}

template <bool kEntropy, typename T>
TOKCORE_INLINE SoftmaxSum<double> softmax_block(const T* x, int64_t n, double scale) {
  using V = Vec<T>;
  const Acc<T> max = anchor_of(block_max(x, n));
  const V top = V::all(max), to_log2 = V::all(Acc<T>(scale * kLog2E));
  V sum = V::all(0), weighted = V::all(0), a, b;
  const auto add = [&](V entry) __attribute__((always_inline)) {
    const V t = (entry - top) * to_log2;
    const V e = exp2(t);
    sum = sum + e;
    if (kEntropy) weighted = weighted + positive_only(e, e * t);
  };
  for (int64_t j = 0; j < n; j += kUnit<T>) {
    prefetch_next_block(x + j);
    load_unit(x + j, n - j, a, b);
    add(a);
    add(b);
  }
  const double total = reduce_add(sum);
  return {total == 0 ? double(kLowest<T>) : double(max), total,
          kEntropy ? double(reduce_add(weighted)) / kLog2E : 0.0};
}

// (e^u - 1 - u) / u^2 for |u| <= kSmallRatio, to 4e-7 (the double path has the closed series of
// online_softmax.h).
TOKCORE_INLINE FloatVec exp_remainder(FloatVec u) {
  FloatVec r = FloatVec::all(1.0f / 720);
  r = fma(r, u, FloatVec::all(1.0f / 120));
  r = fma(r, u, FloatVec::all(1.0f / 24));
  r = fma(r, u, FloatVec::all(1.0f / 6));
  return fma(r, u, FloatVec::all(0.5f));
}
TOKCORE_INLINE DoubleVec exp_remainder(DoubleVec u) {
  for (int i = 0; i < DoubleVec::kWidth; ++i) u.v[i] = tokcore::exp_remainder(double(u.v[i]));
  return u;
}

// Sums for one direction of the KL of a block, weights q: sum q u and sum q (e^u - 1 - u), with p =
// q e^u.
template <typename V>
struct KlSums {
  V ratio = V::all(0), remainder = V::all(0);
  TOKCORE_INLINE void add(KlSums& s, V q, V p, V u) {
    // A weight that underflowed to 0 leaves p alone; its u may be infinite.
    const V moved = positive_only(q, q * u);
    const V small = q * u * (u * exp_remainder(u));
    s.ratio = s.ratio + moved;
    s.remainder = s.remainder + select(abs(u) < V::all(kSmallRatio), small, p - q - moved);
  }
};

// Sums over a block of both logits, each anchored at its maximum, with log p lowered by `shift`.
struct KlBlockSums {
  double p, q, weighted, forward_ratio, forward_remainder, reverse_ratio, reverse_remainder;
};
// Not inlined: a block is work enough for a call, and both calls below share the code.
template <int kDirections, bool kEntropy, typename T>
static __attribute__((noinline)) KlBlockSums kl_sums(const T* policy, const T* reference, int64_t n,
                                                     double scale, Acc<T> max_p, Acc<T> max_q,
                                                     double shift) {
  using V = Vec<T>;
  using S = Acc<T>;
  const V top_p = V::all(max_p), top_q = V::all(max_q), moved = V::all(S(shift));
  const V to_log2 = V::all(S(scale * kLog2E)), natural = V::all(S(scale));
  const V moved2 = V::all(S(shift * kLog2E));
  V sum_p = V::all(0), sum_q = V::all(0), weighted = V::all(0), xa, xb, ra, rb;
  KlSums<V> forward, reverse;
  const auto add = [&](V x, V r) __attribute__((always_inline)) {
    const V from_top_p = x - top_p, from_top_q = r - top_q;
    const V log_p = from_top_p * to_log2 - moved2;
    const V p = exp2(log_p), q = exp2(from_top_q * to_log2);
    // Both anchored at their maxima, so an offset between the two logits has left before they meet.
    const V u = (from_top_p - from_top_q) * natural - moved;
    sum_p = sum_p + p;
    sum_q = sum_q + q;
    if (kEntropy) weighted = weighted + positive_only(p, p * log_p);
    if (kDirections & 1) KlSums<V>::add(forward, q, p, u);
    if (kDirections & 2) KlSums<V>::add(reverse, p, q, V::all(0) - u);
  };
  for (int64_t j = 0; j < n; j += kUnit<T>) {
    prefetch_next_block(policy + j);
    prefetch_next_block(reference + j);
    load_unit(policy + j, n - j, xa, xb);
    load_unit(reference + j, n - j, ra, rb);
    add(xa, ra);
    add(xb, rb);
  }
  return {double(reduce_add(sum_p)),
          double(reduce_add(sum_q)),
          double(reduce_add(weighted)),
          double(reduce_add(forward.ratio)),
          double(reduce_add(forward.remainder)),
          double(reduce_add(reverse.ratio)),
          double(reduce_add(reverse.remainder))};
}

// The anchored log-ratios u have the block's mean near 0 unless the maximum itself has moved
// against the rest. What is left of two sums of the size of the mean is then off by its rounding.
TOKCORE_INLINE bool off_center(double mean, double divergence) {
  const double size = mean < 0 ? -mean : mean;
  return divergence < size * (size < 1 ? size : 1) / 32;
}

template <int kDirections, bool kEntropy, typename T>
TOKCORE_INLINE KlState<double> kl_block(const T* policy, const T* reference, int64_t n,
                                        double scale) {
  const Acc<T> max_p = anchor_of(block_max(policy, n)), max_q = anchor_of(block_max(reference, n));
  KlBlockSums s = kl_sums<kDirections, kEntropy>(policy, reference, n, scale, max_p, max_q, 0.0);
  KlState<double> state;
  state.policy = {double(max_p), s.p, s.weighted / kLog2E};
  state.reference = {double(max_q), s.q, 0.0};
  const auto combine = [&](double shift) __attribute__((always_inline)) {
    if (kDirections & 1) {
      const TileKl<double> kl = tile_kl(s.q, s.p, s.forward_ratio, s.forward_remainder);
      state.forward = kl.divergence;
      state.log_ratio = shift + kl.log_ratio;
    }
    if (kDirections & 2) {
      const TileKl<double> kl = tile_kl(s.p, s.q, s.reverse_ratio, s.reverse_remainder);
      state.reverse = kl.divergence;
      state.log_ratio = shift - kl.log_ratio;
    }
  };
  combine(0.0);
  const double mean = kDirections & 1 ? s.forward_ratio / s.q : -s.reverse_ratio / s.p;
  if (off_center(mean, kDirections & 1 ? state.forward : state.reverse)) {
    s = kl_sums<kDirections, kEntropy>(policy, reference, n, scale, max_p, max_q, mean);
    combine(mean);
  }
  return state;
}

template <typename Params>
TOKCORE_INLINE double scale_of(const Params& p, int64_t row) {
  return 1.0 / (p.row_temperature ? double(p.row_temperature[row]) : p.temperature);
}

// The three entries of a forward pass over rows that are reduced block by block: whole rows; single
// blocks of rows that are too few to go round; and the merge of those. `Op` gives a State, block(p,
// row, block) and finish(p, row, state).
template <typename Op, typename Params>
static void forward_rows(const Params& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    typename Op::State state;
    for (int64_t block = 0; block < block_count(p.columns); ++block)
      state = merge(state, Op::block(p, p.rows[i], block), scale_of(p, p.rows[i]));
    Op::finish(p, p.rows[i], state);
  }
}
template <typename Op, typename Params>
static void forward_blocks(const Params& p, int64_t begin, int64_t end) {
  const int64_t blocks = block_count(p.columns);
  for (int64_t unit = begin; unit < end; ++unit)
    static_cast<typename Op::State*>(p.blocks)[unit] =
        Op::block(p, p.rows[unit / blocks], unit % blocks);
}
template <typename Op, typename Params>
static void merge_blocks(const Params& p, int64_t begin, int64_t end) {
  const int64_t blocks = block_count(p.columns);
  for (int64_t i = begin; i < end; ++i) {
    typename Op::State state;
    for (int64_t block = 0; block < blocks; ++block)
      state = merge(state, static_cast<const typename Op::State*>(p.blocks)[i * blocks + block],
                    scale_of(p, p.rows[i]));
    Op::finish(p, p.rows[i], state);
  }
}

// Calls step(j, entries) over the units of columns [0, n) that will be written to out.
template <typename T, typename Step>
TOKCORE_INLINE void for_each_unit(int64_t n, const T* out, bool stream, Step unit) {
  // Streaming stores take whole aligned lines: the first step then stops where a line starts.
  int64_t step = kUnit<T>;
  if (stream) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T));
    if (past) step = (64 / int64_t(sizeof(T)) - past) % kUnit<T>;
    if (step == 0) step = kUnit<T>;
  }
  for (int64_t j = 0; j < n; j += step, step = kUnit<T>) unit(j, step < n - j ? step : n - j);
}

}  // namespace TOKCORE_ISA
}  // namespace tokcore

// Defines name(params, begin, end), which runs `call` with T the storage type of the call, and
// counts it for its level.
#define TOKCORE_BY_STORAGE(name, Params, call)                                       \
  template <typename T>                                                              \
  void name##_of(const Params& p, int64_t begin, int64_t end) {                      \
    call(p, begin, end);                                                             \
  }                                                                                  \
  void name(const Params& p, int64_t begin, int64_t end) {                           \
    __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED); \
    switch (p.storage) {                                                             \
      case Storage::kFloat:                                                          \
        return name##_of<float>(p, begin, end);                                      \
      case Storage::kDouble:                                                         \
        return name##_of<double>(p, begin, end);                                     \
      case Storage::kHalf:                                                           \
        return name##_of<Fp16>(p, begin, end);                                       \
      case Storage::kBFloat16:                                                       \
        return name##_of<Bf16>(p, begin, end);                                       \
    }                                                                                \
  }
