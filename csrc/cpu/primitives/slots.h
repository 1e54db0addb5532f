// Slots of a key-value cache, read where they lie: their products with a few query rows, and their
// combinations. A block of slots is swept in tiles; a tile's rows are widened once for the query
// rows taken together, the rows of the tile after next are fetched meanwhile. No result depends on
// which query rows were taken together.
#pragma once

#include <type_traits>

#include "common/cached_attention.h"
#include "cpu/primitives/products.h"
#include "cpu/primitives/slot_blocks.h"

namespace tokcore {
namespace TOKCORE_ISA {
// An entry of a quantised cache.
struct U8 {
  uint8_t bits;
};
TOKCORE_INLINE float to_acc(U8 x) { return float(x.bits); }

#if defined(TOKCORE_ISA_AVX512) || defined(TOKCORE_ISA_AVX2)
// A 32-bit lane gets the word that holds four entries, and takes one of them: the unit's order is
// that of words, entry by entry.
TOKCORE_INLINE void load2(const U8* p, FloatVec& a, FloatVec& b) {
  constexpr int kHalf = FloatVec::kWidth / 2;
  typedef int32_t Words __attribute__((vector_size(4 * kHalf)));
  typedef int32_t Lanes __attribute__((vector_size(8 * kHalf)));
  Words words;
  std::memcpy(&words, p, sizeof words);
#if defined(TOKCORE_ISA_AVX512)
  const Lanes both =
      __builtin_shufflevector(words, words, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  const Lanes first = {0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8};
#else
  const Lanes both = __builtin_shufflevector(words, words, 0, 1, 2, 3, 0, 1, 2, 3);
  const Lanes first = {0, 0, 0, 0, 8, 8, 8, 8};
#endif
  a.v = __builtin_convertvector((both >> first) & 0xff, decltype(a.v));
  b.v = __builtin_convertvector((both >> (first + 16)) & 0xff, decltype(b.v));
}
#endif

namespace {

template <int n>
using Number = std::integral_constant<int, n>;

// ---- sums across the lanes of several vectors ------------------------------------------------

// The lanes of the result are halves of the lanes of a and of b added to each other; kWidth vectors
// become one of their sums, in order. Each sum is the same tree of additions wherever it stands.
#if defined(TOKCORE_ISA_AVX512)
TOKCORE_INLINE FloatVec fold_lanes(FloatVec a, FloatVec b, int step) {
  if (step < 2)  // within 128 bits
    return {__builtin_shufflevector(a.v, b.v, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28,
                                    30) +
            __builtin_shufflevector(a.v, b.v, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29,
                                    31)};
  return {
      __builtin_shufflevector(a.v, b.v, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
      __builtin_shufflevector(a.v, b.v, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,
                              31)};
}
#elif defined(TOKCORE_ISA_AVX2)
TOKCORE_INLINE FloatVec fold_lanes(FloatVec a, FloatVec b, int step) {
  if (step < 2)  // within 128 bits
    return {__builtin_shufflevector(a.v, b.v, 0, 2, 8, 10, 4, 6, 12, 14) +
            __builtin_shufflevector(a.v, b.v, 1, 3, 9, 11, 5, 7, 13, 15)};
  return {__builtin_shufflevector(a.v, b.v, 0, 1, 2, 3, 8, 9, 10, 11) +
          __builtin_shufflevector(a.v, b.v, 4, 5, 6, 7, 12, 13, 14, 15)};
}
#else
TOKCORE_INLINE FloatVec fold_lanes(FloatVec a, FloatVec b, int) {
  return {__builtin_shufflevector(a.v, b.v, 0, 2, 4, 6) +
          __builtin_shufflevector(a.v, b.v, 1, 3, 5, 7)};
}
#endif
TOKCORE_INLINE DoubleVec fold_lanes(DoubleVec a, DoubleVec b, int) {
  return {__builtin_shufflevector(a.v, b.v, 0, 2) + __builtin_shufflevector(a.v, b.v, 1, 3)};
}

template <typename V>
TOKCORE_INLINE V sums_of(V (&x)[V::kWidth]) {
  int step = 0;
  for (int n = V::kWidth; n > 1; n /= 2, ++step)
    for (int i = 0; i < n / 2; ++i) x[i] = fold_lanes(x[2 * i], x[2 * i + 1], step);
  return x[0];
}

// ---- rows in the order of units --------------------------------------------------------------

// A row of D entries in scratch: group by group, each padded with zeros to whole units, entries of
// a unit in the order in which load2 gives them.
template <typename T>
struct UnitRows {
  int64_t groups, size, padded_size, width;
  int order[kUnit<T>];

  TOKCORE_INLINE UnitRows of(const CachedAttention& p) {
    UnitRows rows;
    rows.groups = p.groups;
    rows.size = p.dim / p.groups;
    rows.padded_size = (rows.size + kUnit<T> - 1) / kUnit<T> * kUnit<T>;
    rows.width = rows.groups * rows.padded_size;
    T numbers[kUnit<T>];
    for (int i = 0; i < kUnit<T>; ++i) set_number(i, &numbers[i]);
    Vec<T> a, b;
    Acc<T> found[kUnit<T>];
    load2(numbers, a, b);
    std::memcpy(found, &a.v, sizeof a.v);
    std::memcpy(found + kUnit<T> / 2, &b.v, sizeof b.v);
    for (int i = 0; i < kUnit<T>; ++i) rows.order[i] = int(found[i]);
    return rows;
  }
  // body(entry of the row, place in scratch)
  template <typename Body>
  void for_each(const Body& body) const {
    for (int64_t z = 0; z < groups; ++z)
      for (int64_t d = 0; d < padded_size; ++d) {
        const int64_t entry = d / kUnit<T> * kUnit<T> + order[d % kUnit<T>];
        if (entry < size) body(z * size + entry, z * padded_size + d);
      }
  }

 private:
  static void set_number(int i, U8* out) { out->bits = uint8_t(i); }
  template <typename X>
  static void set_number(int i, X* out) {
    from_acc(Acc<X>(i), out);
  }
};

// The unit at x, of which `left` entries exist; zeros stand for the others.
template <typename T>
TOKCORE_INLINE void load_with_zeros(const T* x, int64_t left, Vec<T>& a, Vec<T>& b) {
  T part[kUnit<T>] = {};
  std::memcpy(static_cast<void*>(part), x, size_t(left) * sizeof(T));
  load2(part, a, b);
}

// ---- blocks of slots -------------------------------------------------------------------------

constexpr int64_t kSlotTile = 16, kSlotsAhead = 2 * kSlotTile;
static_assert(kSlotTile <= kScoresBehind && kSlotsOfBlock % kSlotTile == 0, "tiles of a block");

// The slots of a block, and behind them the last one again.
struct SlotBlock {
  int64_t count;
  int64_t slot[kSlotsOfBlock + kSlotsAhead];

  void list(const int32_t* index, int64_t first, int64_t n) {
    count = n;
    for (int64_t j = 0; j < n + kSlotsAhead; ++j) {
      const int64_t at = first + (j < n ? j : n - 1);
      slot[j] = index == nullptr ? at : index[at];
    }
  }
};

// Query rows taken together with the slots that fill a vector with them.
template <typename T>
constexpr int kMostTogether = Vec<T>::kWidth < 4 ? Vec<T>::kWidth : 4;

// Part of a row that is needed soon: whole lines, in their order.
template <typename T>
TOKCORE_INLINE void fetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t d = 0; d < size; d += kLine) __builtin_prefetch(row + d);
}

template <int kX, bool kFetch, typename T>
TOKCORE_INLINE void score_tile(const SlotBlock& block, const T* keys, const CachedTensor& key,
                               const float* pairs, const UnitRows<T>& layout, const Acc<T>* x,
                               const Acc<T>* x_sums, Acc<T> scale, int64_t j, Acc<T>* out,
                               int64_t stride) {
  using V = Vec<T>;
  using S = Acc<T>;
  constexpr int kW = V::kWidth, kY = kW / kX;
  // Rows swept side by side: as few as give the additions of a sum time, since the memory likes to
  // be read in order.
  constexpr int kStep = kX == 1 || kY == 1 ? 1 : 2;
  const T *row[kY], *next[kY];
  for (int y = 0; y < kY; ++y) {
    row[y] = keys + block.slot[j + y] * key.slot_stride;
    next[y] = keys + block.slot[j + y + kSlotTile] * key.slot_stride;
  }
  V total = V::all(0);
  for (int64_t z = 0; z < layout.groups; ++z) {
    V sum[kW];
    for (int i = 0; i < kW; ++i) sum[i] = V::all(0);
    const int64_t from = z * layout.size, to = z * layout.padded_size;
    for (int first = 0; first < kY; first += kStep) {
      V a[kStep], b[kStep], xa, xb;
      if (kFetch)
        for (int y = 0; y < kStep; ++y) fetch_row(next[first + y] + from, layout.size);
      const auto add = [&](int64_t at) __attribute__((always_inline)) {
        for (int i = 0; i < kX; ++i) {
          load2(x + i * layout.width + at, xa, xb);
          for (int y = 0; y < kStep; ++y) {
            V& so_far = sum[i * kY + first + y];
            so_far = fma(xb, b[y], fma(xa, a[y], so_far));
          }
        }
      };
      int64_t d = 0;
      for (; d + kUnit<T> <= layout.size; d += kUnit<T>) {
        for (int y = 0; y < kStep; ++y) {
          load2(row[first + y] + from + d, a[y], b[y]);
        }
        add(to + d);
      }
      if (d < layout.size) {
        for (int y = 0; y < kStep; ++y)
          load_with_zeros(row[first + y] + from + d, layout.size - d, a[y], b[y]);
        add(to + d);
      }
    }
    V dots = sums_of(sum);
    if (pairs != nullptr) {
      // scale * sum(x u) + offset * sum(x)
      S scales[kW], offsets[kW];
      for (int i = 0; i < kX; ++i)
        for (int y = 0; y < kY; ++y) {
          const float* pair = pairs + block.slot[j + y] * key.slot_pairs + 2 * z;
          scales[i * kY + y] = pair[0];
          offsets[i * kY + y] = pair[1] * x_sums[i * layout.groups + z];
        }
      V by, plus;
      std::memcpy(&by.v, scales, sizeof by.v);
      std::memcpy(&plus.v, offsets, sizeof plus.v);
      dots = fma(by, dots, plus);
    }
    total = total + dots;
  }
  total = total * V::all(scale);
  S lanes[kW];
  std::memcpy(lanes, &total.v, sizeof lanes);
  for (int i = 0; i < kX; ++i)
    for (int y = 0; y < kY; ++y) out[i * stride + j + y] = lanes[i * kY + y];
}

// out(i, j) = scale * x(i) . key of slot j, for `rows` rows x; up to kSlotTile entries behind the
// block are written too. x_sums (rows, Z): sums of x over each group.
template <typename T>
static void block_scores(const SlotBlock& block, const T* keys, const CachedTensor& key,
                         const float* pairs, const UnitRows<T>& layout, const Acc<T>* x,
                         const Acc<T>* x_sums, int64_t rows, Acc<T> scale, Acc<T>* out,
                         int64_t stride) {
  for (int64_t first = 0; first < block.count; first += kSlotTile) {
    const int64_t end = first + kSlotTile < block.count ? first + kSlotTile : block.count;
    const auto tiles = [&](auto together, auto fetch, int64_t i) __attribute__((always_inline)) {
      constexpr int kX = decltype(together)::value, kY = Vec<T>::kWidth / kX;
      for (int64_t j = first; j < end; j += kY)
        score_tile<kX, decltype(fetch)::value>(block, keys, key, pairs, layout,
                                               x + i * layout.width, x_sums + i * layout.groups,
                                               scale, j, out + i * stride, stride);
    };
    int64_t i = 0;
    if (rows >= kMostTogether<T>)
      tiles(Number<kMostTogether<T>>(), Number<1>(), i), i += kMostTogether<T>;
    for (; i + kMostTogether<T> <= rows; i += kMostTogether<T>)
      tiles(Number<kMostTogether<T>>(), Number<0>(), i);
    for (; i + 2 <= rows; i += 2) tiles(Number<2>(), Number<1>(), i);
    for (; i < rows; ++i) tiles(Number<1>(), Number<1>(), i);
  }
}

// Scores become exponentials; n of them. Inlined, GCC 12 takes what exp2 is given for
// uninitialised.
template <typename S>
__attribute__((noinline)) BlockSum<double> block_exponentials(S* x, int64_t n) {
  using V = Vec<S>;
  V top_a = V::all(kLowest<S>), top_b = top_a, sum_a = V::all(0), sum_b = sum_a, a, b;
  for (int64_t j = 0; j < n; j += kUnit<S>) {
    load_unit(x + j, n - j, a, b);
    top_a = max_number(a, top_a);
    top_b = max_number(b, top_b);
  }
  const S max = reduce_max(max_number(top_a, top_b));
  const V top = V::all(anchor_of(max)), to_log2 = V::all(S(kLog2E));
  for (int64_t j = 0; j < n; j += kUnit<S>) {
    load_unit(x + j, n - j, a, b);  // -inf beyond the end: exponentials of 0
    a = exp2((a - top) * to_log2);
    b = exp2((b - top) * to_log2);
    sum_a = sum_a + a;
    sum_b = sum_b + b;
    store_unit(x + j, n - j, false, a, b);
  }
  return {double(max), double(reduce_add(sum_a + sum_b))};
}

// out(i)[d] += sum over the tile of weight(i, j) * row(j)[d], kU units of d together.
template <int kX, int kU, bool kTail, bool kFetch, typename T>
TOKCORE_INLINE void combine_tile(const T* const* row, const T* const* next, int64_t count,
                                 const Acc<T>* weight, int64_t stride, int64_t from, int64_t left,
                                 Acc<T>* out, int64_t width) {
  using V = Vec<T>;
  V a[kX][kU], b[kX][kU], ya, yb;
  for (int i = 0; i < kX; ++i)
    for (int u = 0; u < kU; ++u) a[i][u] = b[i][u] = V::all(0);
  for (int64_t j = 0; j < count; ++j)
    for (int u = 0; u < kU; ++u) {
      const int64_t d = from + u * kUnit<T>;
      if (kFetch) __builtin_prefetch(next[j] + d);
      if (kTail)
        load_with_zeros(row[j] + d, left, ya, yb);
      else
        load2(row[j] + d, ya, yb);
      for (int i = 0; i < kX; ++i) {
        const V w = V::all(weight[i * stride + j]);
        a[i][u] = fma(w, ya, a[i][u]);
        b[i][u] = fma(w, yb, b[i][u]);
      }
    }
  for (int i = 0; i < kX; ++i)
    for (int u = 0; u < kU; ++u) {
      Acc<T>* const to = out + i * width + u * kUnit<T>;
      load2(to, ya, yb);
      store2(to, ya + a[i][u], yb + b[i][u]);
    }
}

// out(i) += sum over the block's slots of weight(i, slot) * value, for `rows` rows; tile by tile.
template <typename T>
static void block_combination(const SlotBlock& block, const T* values, const CachedTensor& value,
                              const float* pairs, const UnitRows<T>& layout, const Acc<T>* weight,
                              int64_t stride, int64_t rows, Acc<T>* out) {
  using S = Acc<T>;
  for (int64_t first = 0; first < block.count; first += kSlotTile) {
    const int64_t n = block.count - first < kSlotTile ? block.count - first : kSlotTile;
    const T *row[kSlotTile], *next[kSlotTile];
    for (int64_t j = 0; j < n; ++j) {
      row[j] = values + block.slot[first + j] * value.slot_stride;
      next[j] = values + block.slot[first + j + kSlotTile] * value.slot_stride;
    }
    const auto tiles = [&](auto together, auto fetch, int64_t i) __attribute__((always_inline)) {
      constexpr int kX = decltype(together)::value, kU = kX >= 4 ? 1 : 4 / kX;
      constexpr bool kFetch = decltype(fetch)::value;
      for (int64_t z = 0; z < layout.groups; ++z) {
        const S* w = weight + i * stride + first;
        int64_t w_stride = stride;
        S* const to = out + i * layout.width + z * layout.padded_size;
        S scaled[kX * kSlotTile];
        if (pairs != nullptr) {
          // sum(w (scale u + offset)) = sum((w scale) u) + sum(w offset)
          for (int x = 0; x < kX; ++x) {
            S plus = 0;
            for (int64_t j = 0; j < n; ++j) {
              const float* pair = pairs + block.slot[first + j] * value.slot_pairs + 2 * z;
              scaled[x * kSlotTile + j] = w[x * stride + j] * pair[0];
              plus += w[x * stride + j] * pair[1];
            }
            for (int64_t d = 0; d < layout.padded_size; ++d) to[x * layout.width + d] += plus;
          }
          w = scaled;
          w_stride = kSlotTile;
        }
        const int64_t from = z * layout.size;
        int64_t d = 0;
        for (; d + kU * kUnit<T> <= layout.size; d += kU * kUnit<T>)
          combine_tile<kX, kU, false, kFetch>(row, next, n, w, w_stride, from + d, 0, to + d,
                                              layout.width);
        for (; d + kUnit<T> <= layout.size; d += kUnit<T>)
          combine_tile<kX, 1, false, kFetch>(row, next, n, w, w_stride, from + d, 0, to + d,
                                             layout.width);
        if (d < layout.size)
          combine_tile<kX, 1, true, false>(row, next, n, w, w_stride, from + d, layout.size - d,
                                           to + d, layout.width);
      }
    };
    int64_t i = 0;
    if (rows >= 4) tiles(Number<4>(), Number<1>(), i), i += 4;
    for (; i + 4 <= rows; i += 4) tiles(Number<4>(), Number<0>(), i);
    for (; i + 2 <= rows; i += 2) tiles(Number<2>(), Number<1>(), i);
    for (; i < rows; ++i) tiles(Number<1>(), Number<1>(), i);
  }
}

// ---- queries ---------------------------------------------------------------------------------

// `rows` query rows from `first` on, in the order of units, and the sums of their groups.
template <typename T, typename Q>
static void load_queries_of(const Q* query, int64_t dim, const UnitRows<T>& layout, int64_t rows,
                            Acc<T>* x, Acc<T>* x_sums) {
  for (int64_t i = 0; i < rows; ++i) {
    Acc<T>* const to = x + i * layout.width;
    for (int64_t d = 0; d < layout.width; ++d) to[d] = 0;
    layout.for_each(
        [&](int64_t entry, int64_t place) { to[place] = to_acc(query[i * dim + entry]); });
    for (int64_t z = 0; z < layout.groups; ++z) {
      double sum = 0;
      for (int64_t d = 0; d < layout.padded_size; ++d)
        sum += double(to[z * layout.padded_size + d]);
      x_sums[i * layout.groups + z] = Acc<T>(sum);
    }
  }
}

// body(T()) with the type of the cache's entries, and body(Q()) with that of queries and output.
template <typename Body>
TOKCORE_INLINE void of_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat:
      return body(float());
    case Storage::kDouble:
      return body(double());
    case Storage::kHalf:
      return body(Fp16());
    case Storage::kBFloat16:
      return body(Bf16());
  }
}
template <typename Body>
TOKCORE_INLINE void of_cache(const CachedAttention& p, Storage storage, const Body& body) {
  if (p.key.quantization != nullptr) return body(U8());
  of_storage(storage, body);
}

static int64_t row_width(const CachedAttention& p, Storage storage) {
  int64_t found = 0;
  of_cache(p, storage, [&](auto entry) { found = UnitRows<decltype(entry)>::of(p).width; });
  return found;
}

template <typename T>
static void load_queries(const CachedAttention& p, Storage storage, const UnitRows<T>& layout,
                         int64_t first, int64_t rows, Acc<T>* x, Acc<T>* x_sums) {
  of_storage(storage, [&](auto entry) {
    using Q = decltype(entry);
    if constexpr (std::is_same<Acc<Q>, Acc<T>>::value)
      load_queries_of(static_cast<const Q*>(p.query) + first * p.dim, p.dim, layout, rows, x,
                      x_sums);
  });
}

}  // namespace
}  // namespace TOKCORE_ISA
}  // namespace tokcore
