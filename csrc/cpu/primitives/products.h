// Products of a few rows with a tile of others, in the accumulation type: what an attention does to
// the rows of one head. Sizes are tens of rows; a result does not depend on which rows were taken
// together.
#pragma once

#include "cpu/primitives/vocabulary.h"

namespace tokcore {
namespace TOKCORE_ISA {

// ---- rows of the accumulation type, padded with zeros to whole units ------------------------

template <typename S>
TOKCORE_INLINE int64_t padded(int64_t dim) {
  return (dim + kUnit<S> - 1) / kUnit<S> * kUnit<S>;
}

template <typename T>
TOKCORE_INLINE void unpack(const T* x, int64_t dim, Acc<T>* out) {
  Vec<T> a, b;
  for (int64_t j = 0; j < dim; j += kUnit<T>) {
    if (dim - j >= kUnit<T>) {
      load2(x + j, a, b);
    } else {
      T part[kUnit<T>];
      for (int i = 0; i < kUnit<T>; ++i) {
        if (i < dim - j)
          part[i] = x[j + i];
        else
          from_acc(Acc<T>(0), &part[i]);
      }
      load2(part, a, b);
    }
    store2(out + j, a, b);
  }
}

// The other way, times `factor`. Units of T are in the order in which unpack left them.
template <typename T>
TOKCORE_INLINE void pack(const Acc<T>* x, Acc<T> factor, int64_t dim, T* out) {
  const Vec<T> f = Vec<T>::all(factor);
  Vec<T> a, b;
  for (int64_t j = 0; j < dim; j += kUnit<T>) {
    load2(x + j, a, b);
    store_unit(out + j, dim - j, false, a * f, b * f);
  }
}

// ---- small products -------------------------------------------------------------------------

// out(i, j) = factor * x(i) . y(j), each summed in one order whatever kX and kY.
template <int kX, int kY, typename S>
TOKCORE_INLINE void product(const S* x, const S* y, int64_t width, S factor, S* out,
                            int64_t stride) {
  using V = Vec<S>;
  V sum[kX][kY];
  for (int i = 0; i < kX; ++i)
    for (int j = 0; j < kY; ++j) sum[i][j] = V::all(0);
  for (int64_t d = 0; d < width; d += kUnit<S>) {
    V xa[kX], xb[kX], ya, yb;
    for (int i = 0; i < kX; ++i) load2(x + i * width + d, xa[i], xb[i]);
    for (int j = 0; j < kY; ++j) {
      load2(y + j * width + d, ya, yb);
      for (int i = 0; i < kX; ++i) sum[i][j] = fma(xb[i], yb, fma(xa[i], ya, sum[i][j]));
    }
  }
  for (int i = 0; i < kX; ++i)
    for (int j = 0; j < kY; ++j) out[i * stride + j] = factor * reduce_add(sum[i][j]);
}

template <int kX, typename S>
TOKCORE_INLINE void products_of(const S* x, const S* y, int64_t count, int64_t width, S factor,
                                S* out, int64_t stride) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) product<kX, 4>(x, y + j * width, width, factor, out + j, stride);
  for (; j < count; ++j) product<kX, 1>(x, y + j * width, width, factor, out + j, stride);
}

template <typename S>
static void products(const S* x, int64_t rows, const S* y, int64_t count, int64_t width, S factor,
                     S* out, int64_t stride) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2)
    products_of<2>(x + i * width, y, count, width, factor, out + i * stride, stride);
  if (i < rows) products_of<1>(x + i * width, y, count, width, factor, out + i * stride, stride);
}

// out(i) += sum over j of weight(i, j) y(j), in the order of j.
template <int kX, typename S>
TOKCORE_INLINE void combination(const S* weight, int64_t stride, const S* y, int64_t count,
                                int64_t width, S* out) {
  using V = Vec<S>;
  for (int64_t d = 0; d < width; d += kUnit<S>) {
    V a[kX], b[kX], ya, yb;
    for (int i = 0; i < kX; ++i) load2(out + i * width + d, a[i], b[i]);
    for (int64_t j = 0; j < count; ++j) {
      load2(y + j * width + d, ya, yb);
      for (int i = 0; i < kX; ++i) {
        const V w = V::all(weight[i * stride + j]);
        a[i] = fma(w, ya, a[i]);
        b[i] = fma(w, yb, b[i]);
      }
    }
    for (int i = 0; i < kX; ++i) store2(out + i * width + d, a[i], b[i]);
  }
}

template <typename S>
static void combine(const S* weight, int64_t stride, int64_t rows, const S* y, int64_t count,
                    int64_t width, S* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    combination<4>(weight + i * stride, stride, y, count, width, out + i * width);
  for (; i < rows; ++i)
    combination<1>(weight + i * stride, stride, y, count, width, out + i * width);
}

}  // namespace TOKCORE_ISA
}  // namespace tokcore
