// The sweep over one row's vocabulary that the loss operators share. A block takes a row: each
// thread holds a few 16-byte packs of it at a time, a tile, in registers, looks at them twice
// (maximum first, exponentials after) and merges what it found into its running state; the states
// merge across the block at the end. A row is read from memory once.
//
// In the forward, packs begin at fixed columns, whatever the address of the row, and the number of
// threads follows from the length of the row alone: a row's statistics do not depend on where it
// lies, nor on the rows beside it. In the backward no entry depends on another, so packs begin
// where the stores are aligned.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/online_softmax.h"
#include "cuda/primitives/block.cuh"
#include "cuda/primitives/device.h"

namespace tokcore {
namespace {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Entries of a tile, for each tensor of a forward; they wait in registers. A merge costs as much as
// four to eight entries of a tile, which is why a tile is not smaller; the backward, which merges
// nothing and writes besides, takes half.
template <typename T>
constexpr int kForwardEntries = std::is_same_v<T, double> ? 8 : 32;
template <typename T>
constexpr int kBackwardEntries = kForwardEntries<T> / 2;

// Blocks that an SM holds at least: with two of 256 threads, the tiles in flight are several times
// what covers the memory's latency. Doubles take the registers of both.
template <typename T>
constexpr int kMinBlocks = std::is_same_v<T, double> ? 1 : 2;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <typename acc_t>
constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
template <typename acc_t>
constexpr acc_t kNaN = std::numeric_limits<acc_t>::quiet_NaN();

// Stands for an infinite logarithm where it meets a weight that may be 0: 0 * kHuge is 0, and so is
// 2^-kHuge.
constexpr double kHuge = 1e20;

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// Threads for a row of `size` entries: each has four tiles or more, until the block is full.
template <typename T>
__host__ inline unsigned threads_of_row(int64_t size) {
  unsigned threads = kWarpThreads;
  while (threads < kMaxThreads && size > int64_t(threads) * 4 * kForwardEntries<T>) threads *= 2;
  return threads;
}

// Where the packs of one thread lie: at `first`, and every `stride` columns after it.
struct Columns {
  int64_t first, stride;
};

template <typename T>
__device__ __forceinline__ Columns fixed_columns() {
  return {int64_t(threadIdx.x) * Pack<T>::kSize, int64_t(blockDim.x) * Pack<T>::kSize};
}

// Columns at which 16-byte stores into the row `out` are aligned; the first pack may begin before
// the row.
template <typename T>
__device__ __forceinline__ Columns aligned_columns(const T* out) {
  const Columns columns = fixed_columns<T>();
  const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T));
  return {columns.first - past, columns.stride};
}

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ bool inside(int64_t column, int64_t size) {
  return column >= 0 && column + Pack<T>::kSize <= size;
}

// One pack of a row, entry by entry where it is cut by an end of the row or not aligned; -inf
// stands for what is outside.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t column, int64_t size) {
  if (inside<T>(column, size) && is_aligned(row + column)) return load16_streaming(row + column);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) {
    pack[k] = column + k >= 0 && column + k < size ? row[column + k] : T(-kInfinity<float>);
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* row, int64_t column, int64_t size,
                                           const Pack<T>& pack) {
  if (inside<T>(column, size) && is_aligned(row + column))
    return store16_streaming(row + column, pack);
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) {
    if (column + k >= 0 && column + k < size) row[column + k] = pack[k];
  }
}

// The tile of `n` entries that begins at `column`; -inf stands for what is outside the row.
template <typename T, int n>
__device__ __forceinline__ void load_tile(const T* row, int64_t column, int64_t stride,
                                          int64_t size, Acc<T> (&x)[n]) {
  constexpr int kWidth = Pack<T>::kSize, kPacks = n / kWidth;
  static_assert(n % kWidth == 0, "a tile is a whole number of packs");
  Pack<T> packs[kPacks];
  // One test for the usual tile, so that all its loads are under way before the first is waited
  // for.
  if (column >= 0 && inside<T>(column + (kPacks - 1) * stride, size) && is_aligned(row + column)) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load16_streaming(row + column + i * stride);
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_pack(row, column + i * stride, size);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = Acc<T>(packs[i / kWidth][i % kWidth]);
}

template <typename T, int n>
__device__ __forceinline__ void store_tile(T* row, int64_t column, int64_t stride, int64_t size,
                                           const Acc<T> (&x)[n]) {
  constexpr int kWidth = Pack<T>::kSize;
#pragma unroll
  for (int i = 0; i < n / kWidth; ++i) {
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack[k] = T(x[i * kWidth + k]);
    store_pack(row, column + i * stride, size, pack);
  }
}

template <typename T>
__device__ __forceinline__ void fill_row(T* row, int64_t size, Acc<T> value) {
  Acc<T> x[Pack<T>::kSize];
#pragma unroll
  for (Acc<T>& entry : x) entry = value;
  const Columns columns = aligned_columns(row);
  for (int64_t column = columns.first; column < size; column += columns.stride) {
    store_tile(row, column, columns.stride, size, x);
  }
}

// The maximum of a tile, to hold its exponentials against: 0 where there is no finite entry, so
// that they are all 0. A NaN gives way here and comes back in the sum.
template <typename acc_t, int n>
__device__ __forceinline__ acc_t anchor_of(const acc_t (&x)[n]) {
  acc_t top = -kInfinity<acc_t>;
#pragma unroll
  for (int i = 0; i < n; ++i) top = max(top, x[i]);
  return top == -kInfinity<acc_t> ? acc_t(0) : top;
}

template <bool kEntropy, typename acc_t, int n>
__device__ __forceinline__ SoftmaxSum<acc_t> softmax_tile(const acc_t (&x)[n], acc_t scale) {
  const acc_t anchor = anchor_of(x), to_log2 = scale * acc_t(kLog2E);
  acc_t sum = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const acc_t log2_e = (x[i] - anchor) * to_log2, e = exp2_of(log2_e);
    sum += e;
    if (kEntropy) weighted += e * max(log2_e, acc_t(-kHuge));
  }
  return {anchor, sum, weighted * acc_t(kLn2)};
}

// One distribution of a row, its statistics known.
template <typename acc_t>
struct Distribution {
  acc_t max, logsum, scale;

  __device__ __forceinline__ acc_t log_probability(acc_t x) const {
    return (x - max) * scale - logsum;
  }
};

template <typename acc_t>
__device__ __forceinline__ acc_t probability(acc_t log_probability) {
  return exp2_of(log_probability * acc_t(kLog2E));
}

// 1 / T of a row. A temperature that is not positive makes the row NaN.
template <typename acc_t>
__device__ __forceinline__ acc_t scale_of(const float* row_temperature, acc_t scale, int64_t row) {
  if (row_temperature == nullptr) return scale;
  const acc_t temperature = acc_t(row_temperature[row]);
  return temperature > acc_t(0) ? acc_t(1) / temperature : kNaN<acc_t>;
}

template <typename acc_t>
__device__ __forceinline__ acc_t value_or_zero(const acc_t* values, int64_t i) {
  return values == nullptr ? acc_t(0) : values[i];
}

}  // namespace
}  // namespace tokcore
