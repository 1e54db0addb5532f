// Tiles of rows in shared memory and what a block does with a pair of them: all threads find the
// products of rows with rows; each warp then has rows of its own, a lane for each column, and sums
// up in registers. Which columns a row takes is one ballot: where it is not all of them, the others
// are skipped, so that NaN there is harmless. Sums are in the order of columns either way.
#pragma once

#include <cstdint>

#include "cuda/primitives/vocabulary.cuh"

namespace tokcore {
namespace {

constexpr int kTileThreads = 128, kTileWarps = kTileThreads / kWarpThreads;

// kDim: entries of a row, rounded up.
template <typename T, int dim>
struct Tiles {
  using Scalar = T;
  using acc_t = Acc<T>;
  static constexpr int kDim = dim;
  // Two sums of a thread are at most 64 floats, or as many doubles of longer rows.
  static constexpr int kSide = kDim <= 128 && sizeof(acc_t) == 4 ? 32 : 16;
  static constexpr int kStride = kDim + 1;       // so that rows begin in different banks
  static constexpr int kPairStride = kSide + 1;  // the same
  static constexpr int kEntries = kSide * kStride, kPairs = kSide * kPairStride;
  static constexpr int kRows = kSide / kTileWarps;  // of a warp: warp, warp + kTileWarps, ...
  static constexpr int kPer = kDim / kWarpThreads;  // entries of a row in each lane
  static constexpr int kAcross = 8, kDown = kTileThreads / kAcross;  // threads over a tile of pairs
  static_assert(kDim % kWarpThreads == 0 && kSide <= kWarpThreads && kSide % kDown == 0);
  // Four tiles and two of pairs fit into what sm_80 has.
  static_assert((4 * kEntries + 2 * kPairs) * sizeof(acc_t) <= 163 * 1024);

  static constexpr size_t bytes(int tiles, int pairs) {
    return (tiles * kEntries + pairs * kPairs) * sizeof(acc_t);
  }
  // Tile `i` of those at the beginning; tile of pairs `i` behind `tiles` of them.
  __device__ __forceinline__ static Shared<acc_t> tile(int i) {
    return dynamic_shared<acc_t>(kEntries, i * kEntries * sizeof(acc_t));
  }
  __device__ __forceinline__ static Shared<acc_t> pairs(int tiles, int i) {
    return dynamic_shared<acc_t>(kPairs, (tiles * kEntries + i * kPairs) * sizeof(acc_t));
  }

  struct Sums {
    acc_t of[kRows][kPer] = {};
  };
};

__device__ __forceinline__ int lane_of_thread() { return int(threadIdx.x) % kWarpThreads; }

template <typename acc_t>
__device__ __forceinline__ acc_t warp_sum(acc_t x) {
#pragma unroll
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, lanes);
  return x;
}
// A NaN gives way.
template <typename acc_t>
__device__ __forceinline__ acc_t warp_max(acc_t x) {
  x = x == x ? x : -kInfinity<acc_t>;
#pragma unroll
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
    const acc_t other = __shfl_xor_sync(kWholeWarp, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// Rows `row_of(i)` of a tensor, times a factor; zeros where there is none (-1).
template <typename Tile, typename RowOf>
__device__ __forceinline__ void load_tile(const void* tensor, int64_t dim,
                                          typename Tile::acc_t factor, const RowOf& row_of,
                                          Shared<typename Tile::acc_t> tile) {
  using acc_t = typename Tile::acc_t;
  for (int e = threadIdx.x; e < Tile::kSide * Tile::kDim; e += kTileThreads) {
    const int i = e / Tile::kDim, d = e % Tile::kDim;
    const int64_t row = row_of(i);
    const bool is = row >= 0 && d < dim;
    tile[i * Tile::kStride + d] =
        is ? acc_t(static_cast<const typename Tile::Scalar*>(tensor)[row * dim + d]) * factor
           : acc_t(0);
  }
}

// out(i, j) = x(i) . y(j)
template <typename Tile>
__device__ __forceinline__ void multiply(Shared<typename Tile::acc_t> x,
                                         Shared<typename Tile::acc_t> y, int dim,
                                         Shared<typename Tile::acc_t> out) {
  using acc_t = typename Tile::acc_t;
  constexpr int kRows = Tile::kSide / Tile::kDown, kColumns = Tile::kSide / Tile::kAcross;
  const int row = int(threadIdx.x) / Tile::kAcross, column = int(threadIdx.x) % Tile::kAcross;
  acc_t sums[kRows][kColumns] = {};
  for (int d = 0; d < dim; ++d) {
    acc_t of_row[kRows], of_column[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_row[r] = x[(row + r * Tile::kDown) * Tile::kStride + d];
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      of_column[c] = y[(column + c * Tile::kAcross) * Tile::kStride + d];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] += of_row[r] * of_column[c];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      out[(row + r * Tile::kDown) * Tile::kPairStride + column + c * Tile::kAcross] = sums[r][c];
}

// sums(i) += weight(i, j) y(j) of the rows of this warp, over the columns that each of them sees.
template <typename Tile>
__device__ __forceinline__ void combine(const unsigned (&seen)[Tile::kRows],
                                        Shared<typename Tile::acc_t> weight,
                                        Shared<typename Tile::acc_t> y, int warp,
                                        typename Tile::Sums& sums) {
  using acc_t = typename Tile::acc_t;
  unsigned by_all = kWholeWarp;
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) by_all &= seen[r];
  if (by_all == kWholeWarp >> (kWarpThreads - Tile::kSide)) {
    for (int j = 0; j < Tile::kSide; ++j) {
      acc_t entries[Tile::kPer];
#pragma unroll
      for (int c = 0; c < Tile::kPer; ++c)
        entries[c] = y[j * Tile::kStride + lane_of_thread() + c * kWarpThreads];
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const acc_t w = weight[(warp + r * kTileWarps) * Tile::kPairStride + j];
#pragma unroll
        for (int c = 0; c < Tile::kPer; ++c) sums.of[r][c] += w * entries[c];
      }
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r)
    for (unsigned left = seen[r]; left != 0; left &= left - 1) {
      const int j = __ffs(left) - 1;
      const acc_t w = weight[(warp + r * kTileWarps) * Tile::kPairStride + j];
#pragma unroll
      for (int c = 0; c < Tile::kPer; ++c)
        sums.of[r][c] += w * acc_t(y[j * Tile::kStride + lane_of_thread() + c * kWarpThreads]);
    }
}

// A row of this warp, times a factor.
template <typename Tile, typename out_t>
__device__ __forceinline__ void store_row(const typename Tile::Sums& sums, int r,
                                          typename Tile::acc_t factor, void* tensor, int64_t row,
                                          int64_t dim) {
#pragma unroll
  for (int c = 0; c < Tile::kPer; ++c) {
    const int64_t d = lane_of_thread() + c * kWarpThreads;
    if (d < dim)
      static_cast<out_t*>(tensor)[row * dim + d] = static_cast<out_t>(sums.of[r][c] * factor);
  }
}

}  // namespace
}  // namespace tokcore
