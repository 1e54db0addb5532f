// The weights that the last tokens of a prompt give to the slots of a cache, summed over heads.
// Scores are found twice, as nothing of the size of all heads' weights is ever kept: first a block
// finds the sums of a split of the slots for a few queries of a head, then, for a few queries
// of a list, what each slot weighs in all heads.
#include <torch/csrc/stable/library.h>

#include "common/cached_attention_call.h"
#include "common/namespace.h"
#include "cuda/launch.h"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/slots.cuh"

namespace tokcore {
namespace {

struct PromptScoresParams : CachedAttention {
  ScalarType type;  // of the query
  int64_t splits;
  void* sums;    // (B, Hq, Q, splits): BlockSum of the accumulation type
  void* merged;  // (B, Hq, Q): maximum, and inverse of the sum, as a BlockSum
};

// All slots of a split, from `first` on.
__device__ __forceinline__ void number_slots(int64_t first, Shared<int> slots) {
  for (int j = threadIdx.x; j < kSlotsOfSplit; j += kSlotThreads) slots[j] = int(first) + j;
}

// Slots of the split that query i sees.
__device__ __forceinline__ int seen_of_split(const CachedAttention& p, int64_t list, int64_t i,
                                             int64_t first) {
  const int64_t n = p.seen(p.count[list], i) - first;
  return int(n < 0 ? 0 : n < kSlotsOfSplit ? n : kSlotsOfSplit);
}

// A few queries of a head, and a split of the slots.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kSlotThreads) prompt_sum_kernel(PromptScoresParams p) {
  using Traits = SlotTraits<T, kLanes>;
  using acc_t = Acc<T>;
  constexpr int kRows = Traits::kRows;
  TOKCORE_SHARED(int, slots, kSlotsOfSplit);
  TOKCORE_SHARED(acc_t, queries, kRows * Traits::kDim);
  TOKCORE_SHARED(acc_t, scores, kRows * kSlotsOfSplit);
  BlockSum<acc_t>* const sums = static_cast<BlockSum<acc_t>*>(p.sums);
  const int warp = warp_of_thread();
  const int64_t chunks = (p.queries + kRows - 1) / kRows;
  const int64_t units = p.batch * p.query_heads * chunks * p.splits;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t split = unit % p.splits, head = unit / p.splits / chunks;
    const int64_t query = unit / p.splits % chunks * kRows, row = head * p.queries + query;
    const int64_t b = head / p.query_heads, h = head % p.query_heads / p.group();
    const int64_t list = p.list_of(b, h), first = split * kSlotsOfSplit;
    if (!p.has_valid_count(list)) continue;
    const int here = int(p.queries - query < kRows ? p.queries - query : kRows);
    const int n = seen_of_split(p, list, query + here - 1, first);
    // Everyone is done with the unit before.
    __syncthreads();
    number_slots(first, slots);
    load_queries<T, kLanes>(p.query, p.type, row, here, int(p.dim), queries);
    // The slots and the queries are written.
    __syncthreads();
    if (n > 0) split_scores<T, kLanes>(p, b, h, slots, n, queries, scores);
    // The scores are written.
    __syncthreads();
    for (int i = warp; i < here; i += kSlotWarps) {
      const BlockSum<acc_t> found = warp_exponentials<acc_t>(
          scores + i * kSlotsOfSplit, seen_of_split(p, list, query + i, first), [](int, acc_t) {});
      if (threadIdx.x % kWarpThreads == 0) sums[(row + i) * p.splits + split] = found;
    }
  }
}

// A thread for each query of each head.
template <typename acc_t>
__global__ void __launch_bounds__(kSlotThreads) prompt_merge_kernel(PromptScoresParams p) {
  const int64_t rows = p.batch * p.query_heads * p.queries,
                stride = int64_t(gridDim.x) * kSlotThreads;
  for (int64_t row = int64_t(blockIdx.x) * kSlotThreads + threadIdx.x; row < rows; row += stride) {
    const auto merged =
        softmax_of_blocks(static_cast<const BlockSum<acc_t>*>(p.sums) + row * p.splits, p.splits);
    static_cast<BlockSum<acc_t>*>(p.merged)[row] = {merged.max, merged.inverse};
  }
}

// A few queries of a list, and a split of its slots.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kSlotThreads) prompt_row_kernel(PromptScoresParams p) {
  using Traits = SlotTraits<T, kLanes>;
  using acc_t = Acc<T>;
  constexpr int kRows = Traits::kRows, kEach = kSlotsOfSplit / kSlotThreads;
  TOKCORE_SHARED(int, slots, kSlotsOfSplit);
  TOKCORE_SHARED(acc_t, queries, kRows * Traits::kDim);
  TOKCORE_SHARED(acc_t, scores, kRows * kSlotsOfSplit);
  const int64_t chunks = (p.queries + kRows - 1) / kRows;
  const int64_t units = p.batch * p.lists * chunks * p.splits;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t split = unit % p.splits, list = unit / p.splits / chunks, b = list / p.lists;
    const int64_t query = unit / p.splits % chunks * kRows, first = split * kSlotsOfSplit;
    const int here = int(p.queries - query < kRows ? p.queries - query : kRows);
    const bool valid = p.has_valid_count(list);
    const int n = valid ? seen_of_split(p, list, query + here - 1, first) : 0;
    // Everyone is done with the unit before.
    __syncthreads();
    number_slots(first, slots);
    acc_t weight[kRows][kEach];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) weight[i][e] = valid ? acc_t(0) : kNaN<acc_t>;
    }
    const int64_t group = n > 0 ? p.group() : 0, h_first = p.lists == 1 ? 0 : list % p.lists;
    const int64_t h_end = p.lists == 1 ? p.heads : h_first + 1;
    int64_t row = list * p.sharing() * p.queries + query;
    for (int64_t h = h_first; h < h_end; ++h)
      for (int64_t g = 0; g < group; ++g, row += p.queries) {
        load_queries<T, kLanes>(p.query, p.type, row, here, int(p.dim), queries);
        // The slots and the queries are written; the scores of the head before are read.
        __syncthreads();
        split_scores<T, kLanes>(p, b, h, slots, n, queries, scores);
        // The scores are written; the queries are read.
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= here) continue;
          const BlockSum<acc_t> merged = static_cast<const BlockSum<acc_t>*>(p.merged)[row + i];
          const int seen = seen_of_split(p, list, query + i, first);
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const int j = int(threadIdx.x) + e * kSlotThreads;
            if (j < seen)
              weight[i][e] += exp2_of((scores[i * kSlotsOfSplit + j] - finite_anchor(merged.max)) *
                                      acc_t(kLog2E)) *
                              merged.sum;
          }
        }
      }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int64_t slot = first + threadIdx.x + e * kSlotThreads;
        if (i < here && slot < p.capacity)
          static_cast<acc_t*>(p.rows)[(list * p.queries + query + i) * p.capacity + slot] =
              weight[i][e];
      }
    }
  }
}

Tensor prompt_window_scores_cuda(const Tensor& query, const Tensor& key, const Tensor& count,
                                 const std::optional<Tensor>& key_quantization, double scale) {
  const CachedCall call =
      checked_cached_call("prompt_window_scores", query, key, count, key_quantization, true, scale);
  const DeviceGuard guard(device_index(query));
  PromptScoresParams p{call.tensors, call.type, 0, nullptr, nullptr};
  p.splits = (p.capacity + kSlotsOfSplit - 1) / kSlotsOfSplit;
  const int64_t rows = p.batch * p.query_heads * p.queries;
  Tensor out = allocate_output(query, {p.batch, p.lists, p.queries, p.capacity}, call.statistics);
  Tensor sums = allocate_output(query, {rows * p.splits * 2}, call.statistics);
  Tensor merged = allocate_output(query, {rows * 2}, call.statistics);
  p.rows = out.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  p.merged = merged.mutable_data_ptr();
  dispatch_cache(call.type, call.quantized(), p.dim, [&](auto entry, auto lanes) {
    using T = decltype(entry);
    constexpr int64_t kRows = SlotTraits<T, lanes.value>::kRows;
    const auto stream = current_stream(query);
    const int64_t chunks = (p.queries + kRows - 1) / kRows;
    const auto blocks = [&](int64_t number) {
      return dim3(block_count(number * chunks * p.splits));
    };
    launch(blocks(p.batch * p.query_heads), dim3(kSlotThreads), 0, stream,
           prompt_sum_kernel<T, lanes.value>, p);
    launch(dim3(block_count((rows + kSlotThreads - 1) / kSlotThreads)), dim3(kSlotThreads), 0,
           stream, prompt_merge_kernel<Acc<T>>, p);
    launch(blocks(p.batch * p.lists), dim3(kSlotThreads), 0, stream,
           prompt_row_kernel<T, lanes.value>, p);
  });
  return out;
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("prompt_window_scores", TORCH_BOX(&tokcore::prompt_window_scores_cuda));
}
