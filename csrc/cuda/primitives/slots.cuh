// Slots of a key-value cache against a few query rows. A block takes a split of the slots. A row of
// the cache belongs to a team of lanes, each of which holds kEntries of it in 16-byte packs, so
// that a team reads whole lines and a warp several rows at a time; query rows are taken together as
// far as registers go, so that a row of the cache is read once for all of them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/cached_attention.h"
#include "cuda/primitives/vocabulary.cuh"

namespace tokcore {
namespace {

constexpr int kSlotThreads = 128, kSlotWarps = kSlotThreads / kWarpThreads;
// Slots of a split, a constant so that a result does not depend on how many splits run at a time.
// Of 128 bfloat16 entries a split's keys and values are 128 KB.
constexpr int kSlotsOfSplit = 256;
static_assert(kSlotsOfSplit % kSlotThreads == 0, "each thread has as many slots");
constexpr int kEntries = 16;
// Query rows taken together.
template <typename T>
constexpr int kTogether = std::is_same_v<T, double> ? 1 : 4;

// Of one kind of cache: T its entries, kLanes of a team.
template <typename T, int kLanes>
struct SlotTraits {
  static constexpr int kWidth = Pack<T>::kSize, kPacks = kEntries / kWidth;
  static constexpr int kDim = kLanes * kEntries, kTeams = kSlotThreads / kLanes;
  static constexpr int kRows = kTogether<T>;
  static_assert(kEntries % kWidth == 0 && kWarpThreads % kLanes == 0, "whole packs, whole teams");
  static_assert(kSlotsOfSplit % kTeams == 0, "each team has as many slots");

  __device__ __forceinline__ static int lane() { return int(threadIdx.x) % kLanes; }
  __device__ __forceinline__ static int team() { return int(threadIdx.x) / kLanes; }
  // The column of a lane's pack k: a team's packs k stand side by side.
  __device__ __forceinline__ static int column(int k) { return (k * kLanes + lane()) * kWidth; }
};

// This lane's entries of a row, as numbers; 0 beyond the row. `pairs`: of uint8, (scale, offset) of
// each group of the row.
template <typename T, int kLanes>
__device__ __forceinline__ void load_slot(const T* row, const float* pairs, int dim, int groups,
                                          Acc<T> (&x)[kEntries]) {
  using Traits = SlotTraits<T, kLanes>;
  constexpr int kWidth = Traits::kWidth;
#pragma unroll
  for (int k = 0; k < Traits::kPacks; ++k) {
    const int column = Traits::column(k);
    Pack<T> pack;
    if (column + kWidth <= dim && is_aligned(row + column)) {
      pack = load16_streaming(row + column);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) pack[e] = column + e < dim ? row[column + e] : T(0);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[k * kWidth + e] = Acc<T>(pack[e]);
    if constexpr (std::is_same_v<T, uint8_t>) {
      const int size = dim / groups;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        // Groups are rarely smaller than a pack: the division is made once then.
        const int entry = size % kWidth == 0 ? column : column + e;
        if (column + e >= dim) continue;
        const float* const pair = pairs + 2 * (entry / size);
        x[k * kWidth + e] = pair[0] * x[k * kWidth + e] + pair[1];
      }
    }
  }
}

// Query rows from `first` on, as numbers: `rows` of them, zeros for the others.
template <typename T, int kLanes>
__device__ __forceinline__ void load_queries(const void* query, torch::headeronly::ScalarType type,
                                             int64_t first, int rows, int dim,
                                             Shared<Acc<T>> queries) {
  using torch::headeronly::ScalarType;
  constexpr int kDim = SlotTraits<T, kLanes>::kDim;
  for (int at = threadIdx.x; at < kTogether<T> * kDim; at += kSlotThreads) {
    const int d = at % kDim;
    const int64_t from = (first + at / kDim) * dim + d;
    Acc<T> x = 0;
    if (at / kDim < rows && d < dim) {
      if (type == ScalarType::Float)
        x = Acc<T>(static_cast<const float*>(query)[from]);
      else if (type == ScalarType::BFloat16)
        x = Acc<T>(float(static_cast<const torch::headeronly::BFloat16*>(query)[from]));
      else if (type == ScalarType::Half)
        x = Acc<T>(float(static_cast<const torch::headeronly::Half*>(query)[from]));
      else
        x = Acc<T>(static_cast<const double*>(query)[from]);
    }
    queries[at] = x;
  }
}

// scores(i, j) = scale * query row i . key of slot j, for the n > 0 slots of the split.
template <typename T, int kLanes>
__device__ __forceinline__ void split_scores(const CachedAttention& p, int64_t b, int64_t h,
                                             Shared<int> slots, int n, Shared<Acc<T>> queries,
                                             Shared<Acc<T>> scores) {
  using Traits = SlotTraits<T, kLanes>;
  using acc_t = Acc<T>;
  constexpr int kWidth = Traits::kWidth, kRows = Traits::kRows;
  const T* const keys = p.key.head<T>(b, h);
  const float* const pairs = p.key.quantization == nullptr ? nullptr : p.key.pairs(b, h);
  acc_t x[kRows][kEntries];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k)
      x[i][k] = queries[i * Traits::kDim + Traits::column(k / kWidth) + k % kWidth];
  }
  for (int from = 0; from < n; from += Traits::kTeams) {
    // A team without a slot of its own takes the last one: all lanes meet in the shuffles.
    const int j = from + Traits::team(), slot = slots[j < n ? j : n - 1];
    acc_t y[kEntries];
    load_slot<T, kLanes>(keys + slot * p.key.slot_stride,
                         pairs == nullptr ? nullptr : pairs + slot * p.key.slot_pairs, int(p.dim),
                         int(p.groups), y);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      acc_t sum = 0;
#pragma unroll
      for (int k = 0; k < kEntries; ++k) sum += x[i][k] * y[k];
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
      if (Traits::lane() == 0 && j < n) scores[i * kSlotsOfSplit + j] = acc_t(p.scale) * sum;
    }
  }
}

// A warp's: the greatest of n scores and the sum of their exponentials, in every lane; with
// `keep` (score index, exponential) called for each.
template <typename acc_t, typename Keep>
__device__ __forceinline__ BlockSum<acc_t> warp_exponentials(Shared<acc_t> scores, int n,
                                                             const Keep& keep) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  BlockSum<acc_t> found = {-kInfinity<acc_t>, 0};
  for (int j = lane; j < n; j += kWarpThreads) {
    const acc_t score = scores[j];
    if (score > found.max) found.max = score;
  }
#pragma unroll
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
    const acc_t other = __shfl_xor_sync(kWholeWarp, found.max, lanes);
    if (other > found.max) found.max = other;
  }
  const acc_t anchor = finite_anchor(found.max);
  for (int j = lane; j < n; j += kWarpThreads) {
    const acc_t exponential = exp2_of((scores[j] - anchor) * acc_t(kLog2E));
    found.sum += exponential;
    keep(j, exponential);
  }
#pragma unroll
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
    found.sum += __shfl_xor_sync(kWholeWarp, found.sum, lanes);
  return found;
}

// f(entry of the cache, Constant<lanes of a team>): few lanes where a row is short.
template <typename F>
void dispatch_cache(torch::headeronly::ScalarType query, bool quantized, int64_t dim, F f) {
  const auto by_dim = [&](auto entry) {
    if (dim <= 8 * kEntries) return f(entry, Constant<8>());
    return f(entry, Constant<16>());
  };
  if (quantized) return by_dim(uint8_t());
  dispatch_logits(query, by_dim);
}

}  // namespace
}  // namespace tokcore
