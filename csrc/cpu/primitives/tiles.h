// Products of tiles of rows, dense but for a range of columns that each row takes: what an
// attention over many keys does. Entries of one row are added in the order of columns, one at a
// time, so that a result does not depend on which rows were taken together.
#pragma once

#include "cpu/primitives/products.h"

namespace tokcore {
namespace TOKCORE_ISA {

// ---- memory -------------------------------------------------------------------------------------

// Arrays from one piece of memory, each at the beginning of a line.
struct Carver {
  char* next;
  template <typename E>
  __attribute__((always_inline)) E* take(int64_t entries) {
    constexpr uintptr_t kLine = 64;
    char* const taken = next + (kLine - reinterpret_cast<uintptr_t>(next) % kLine) % kLine;
    next = taken + entries * int64_t(sizeof(E));
    return reinterpret_cast<E*>(taken);
  }
};

template <typename S>
TOKCORE_INLINE void fill(S* x, int64_t n, S value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// A row of a tensor as the accumulation type, times a factor.
template <typename T>
TOKCORE_INLINE void unpack_row(const void* tensor, int64_t row, int64_t dim, int64_t width,
                               Acc<T> factor, Acc<T>* out) {
  using V = Vec<Acc<T>>;
  unpack(static_cast<const T*>(tensor) + row * dim, dim, out);
  V a, b;
  for (int64_t d = 0; factor != Acc<T>(1) && d < width; d += kUnit<Acc<T>>) {
    load2(out + d, a, b);
    store2(out + d, a * V::all(factor), b * V::all(factor));
  }
}

// ---- products -----------------------------------------------------------------------------------

// Rows whose sums stay in registers together, in two vectors each.
#if defined(TOKCORE_ISA_AVX512)
constexpr int kRowsTogether = 8;
#else
constexpr int kRowsTogether = 4;
#endif

struct Range {
  int64_t begin, end;
  TOKCORE_INLINE bool is_empty(const Range& r) { return r.begin >= r.end; }
};

// out(i, d) = sum over j < count of a(i, j) b(j, d), added to what was there where kAdd; rows of b
// and of out have `width` entries, whole units.
template <int kX, bool kAdd, typename S>
TOKCORE_INLINE void tile_product(const S* a, int64_t a_stride, const S* b, int64_t count,
                                 int64_t width, S* out) {
  using V = Vec<S>;
  for (int64_t d = 0; d < width; d += kUnit<S>) {
    V sum_a[kX], sum_b[kX], ya, yb;
    for (int i = 0; i < kX; ++i) {
      if (kAdd)
        load2(out + i * width + d, sum_a[i], sum_b[i]);
      else
        sum_a[i] = sum_b[i] = V::all(0);
    }
    for (int64_t j = 0; j < count; ++j) {
      load2(b + j * width + d, ya, yb);
      for (int i = 0; i < kX; ++i) {
        const V x = V::all(a[i * a_stride + j]);
        sum_a[i] = fma(x, ya, sum_a[i]);
        sum_b[i] = fma(x, yb, sum_b[i]);
      }
    }
    for (int i = 0; i < kX; ++i) store2(out + i * width + d, sum_a[i], sum_b[i]);
  }
}

// x(i) . y(j) for every row that takes a column, with y transposed: (dim, kColumns).
template <int64_t kColumns, typename S>
static void tile_scores(const S* x, int64_t width, const Range* ranges, int64_t rows,
                        const S* transposed, int64_t dim, S* out) {
  static_assert(kColumns % kUnit<S> == 0, "a row of scores is whole units");
  int64_t i = 0;
  for (; i + kRowsTogether <= rows; i += kRowsTogether) {
    bool any = false;
    for (int k = 0; k < kRowsTogether; ++k) any = any || !Range::is_empty(ranges[i + k]);
    if (any)
      tile_product<kRowsTogether, false>(x + i * width, width, transposed, dim, kColumns,
                                         out + i * kColumns);
  }
  for (; i < rows; ++i)
    tile_product<1, false>(x + i * width, width, transposed, dim, kColumns, out + i * kColumns);
}

// out(i) += sum over the row's columns j of weight(i, j) y(j). What a row does not take is not
// multiplied by 0, so that NaN there is harmless.
template <int64_t kColumns, typename S>
static void tile_combine(const S* weight, const Range* ranges, int64_t rows, const S* y,
                         int64_t width, S* out) {
  const auto one = [&](int64_t i, int64_t begin, int64_t end) {
    if (begin < end)
      tile_product<1, true>(weight + i * kColumns + begin, kColumns, y + begin * width, end - begin,
                            width, out + i * width);
  };
  int64_t i = 0;
  for (; i + kRowsTogether <= rows; i += kRowsTogether) {
    int64_t begin = 0, end = kColumns;  // of all of them
    for (int k = 0; k < kRowsTogether; ++k) {
      begin = ranges[i + k].begin > begin ? ranges[i + k].begin : begin;
      end = ranges[i + k].end < end ? ranges[i + k].end : end;
    }
    if (begin >= end) {
      for (int k = 0; k < kRowsTogether; ++k) one(i + k, ranges[i + k].begin, ranges[i + k].end);
      continue;
    }
    for (int k = 0; k < kRowsTogether; ++k) one(i + k, ranges[i + k].begin, begin);
    tile_product<kRowsTogether, true>(weight + i * kColumns + begin, kColumns, y + begin * width,
                                      end - begin, width, out + i * width);
    for (int k = 0; k < kRowsTogether; ++k) one(i + k, end, ranges[i + k].end);
  }
  for (; i < rows; ++i) one(i, ranges[i].begin, ranges[i].end);
}

// kColumns rows of `width` entries become `width` rows of kColumns.
template <int64_t kColumns, typename S>
static void tile_transpose(const S* y, int64_t width, S* out) {
  for (int64_t d = 0; d < width; ++d)
    for (int64_t j = 0; j < kColumns; ++j) out[d * kColumns + j] = y[j * width + d];
}

// ---- a row of scores ----------------------------------------------------------------------------

// What the row does not take.
template <int64_t kColumns, typename S>
TOKCORE_INLINE void fill_outside(S* x, const Range& range, S value) {
  fill(x, range.begin, value);
  fill(x + range.end, kColumns - range.end, value);
}

// Scores become exponentials above `max`; their sum.
template <int64_t kColumns, typename S>
TOKCORE_INLINE S exponentials(S* x, S max) {
  using V = Vec<S>;
  const V top = V::all(max), to_log2 = V::all(S(kLog2E));
  V sum = V::all(0), a, b;
  for (int64_t j = 0; j < kColumns; j += kUnit<S>) {
    load2(x + j, a, b);
    a = exp2((a - top) * to_log2);
    b = exp2((b - top) * to_log2);
    sum = sum + (a + b);
    store2(x + j, a, b);
  }
  return reduce_add(sum);
}

// x becomes exp(x - lse), and slope times that what it becomes; its sum.
template <int64_t kColumns, typename S>
TOKCORE_INLINE S weighted_slopes(S* x, S* slope, S lse) {
  using V = Vec<S>;
  const V of_sum = V::all(lse), to_log2 = V::all(S(kLog2E));
  V sum = V::all(0), a, b, slope_a, slope_b;
  for (int64_t j = 0; j < kColumns; j += kUnit<S>) {
    load2(x + j, a, b);
    load2(slope + j, slope_a, slope_b);
    a = exp2((a - of_sum) * to_log2);
    b = exp2((b - of_sum) * to_log2);
    slope_a = slope_a * a;
    slope_b = slope_b * b;
    sum = sum + (slope_a + slope_b);
    store2(x + j, a, b);
    store2(slope + j, slope_a, slope_b);
  }
  return reduce_add(sum);
}

// The same with lse and delta of each column: slope becomes weight times (slope - delta).
template <int64_t kColumns, typename S>
TOKCORE_INLINE void centered_slopes(S* x, S* slope, const S* lse, const S* delta) {
  using V = Vec<S>;
  const V to_log2 = V::all(S(kLog2E));
  V a, b, c, d;
  for (int64_t j = 0; j < kColumns; j += kUnit<S>) {
    load2(x + j, a, b);
    load2(lse + j, c, d);
    a = exp2((a - c) * to_log2);
    b = exp2((b - d) * to_log2);
    store2(x + j, a, b);
    load2(delta + j, c, d);
    V slope_a, slope_b;
    load2(slope + j, slope_a, slope_b);
    store2(slope + j, a * (slope_a - c), b * (slope_b - d));
  }
}

}  // namespace TOKCORE_ISA
}  // namespace tokcore
