// Attention of one query a head to listed slots of a cache. A block takes a split of the slots of
// one KV head: scores of the group's query heads into shared memory, exponentials above the split's
// maximum, and the values combined with them. Two small kernels bring the splits together: the
// output of each head, then the weights of each slot, summed over the heads that share its list.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cached_attention_call.h"
#include "common/namespace.h"
#include "cuda/launch.h"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/slots.cuh"

namespace tokcore {
namespace {

constexpr int64_t kMostLists = 65535;  // of grid.y

struct SparseDecodeParams : CachedAttention {
  ScalarType type;  // of the query
  int64_t splits, heads_of_list;
  // Of the accumulation type.
  void* scores;    // (B, Hq, M): exponentials above their split's maximum
  void* combined;  // (B, Hq, splits, D)
  void* sums;      // (B, Hq, splits): BlockSum
  void* merged;    // (B, Hq): maximum, and inverse of the sum, as a BlockSum
};

// The slots of a split, read and checked by the block; false where the list is wrong.
__device__ __forceinline__ bool load_slots(const SparseDecodeParams& p, int64_t list, int64_t first,
                                           int n, Shared<int> slots, Shared<int> wrong) {
  // Everyone has used the slots before these.
  __syncthreads();
  if (threadIdx.x == 0) wrong[0] = 0;
  // The mark is cleared.
  __syncthreads();
  const int32_t* const index = p.index == nullptr ? nullptr : p.index + list * p.listed + first;
  for (int j = threadIdx.x; j < n; j += kSlotThreads) {
    const int slot = index == nullptr ? int(first) + j : index[j];
    const int before = index == nullptr || first + j == 0 ? -1 : index[j - 1];
    if (index != nullptr && (slot <= before || slot >= p.capacity)) atomicOr(&wrong[0], 1);
    slots[j] = slot;
  }
  // The slots and the mark are written.
  __syncthreads();
  return wrong[0] == 0;
}

// Sums the teams' combinations of kRows query rows and writes the first `rows` of them.
template <typename T, int kLanes>
__device__ __forceinline__ void store_combined(
    const SparseDecodeParams& p, Acc<T> (&out)[SlotTraits<T, kLanes>::kRows][kEntries],
    Shared<Acc<T>> of_warps, int64_t head, int64_t split, int rows) {
  using Traits = SlotTraits<T, kLanes>;
  using acc_t = Acc<T>;
  constexpr int kDim = Traits::kDim, kWidth = Traits::kWidth;
  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int i = 0; i < Traits::kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      acc_t sum = out[i][k];
#pragma unroll
      for (int lanes = kLanes; lanes < kWarpThreads; lanes *= 2)
        sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
      if (lane < kLanes)
        of_warps[(warp * Traits::kRows + i) * kDim + Traits::column(k / kWidth) + k % kWidth] = sum;
    }
  }
  // The sums of all warps are written.
  __syncthreads();
  for (int at = threadIdx.x; at < rows * kDim; at += kSlotThreads) {
    const int i = at / kDim, d = at % kDim;
    if (d >= p.dim) continue;
    acc_t sum = 0;
    for (int w = 0; w < kSlotWarps; ++w) sum += of_warps[(w * Traits::kRows + i) * kDim + d];
    static_cast<acc_t*>(p.combined)[((head + i) * p.splits + split) * p.dim + d] = sum;
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kSlotThreads) decode_split_kernel(SparseDecodeParams p) {
  using Traits = SlotTraits<T, kLanes>;
  using acc_t = Acc<T>;
  constexpr int kRows = Traits::kRows;
  TOKCORE_SHARED(int, slots, kSlotsOfSplit);
  TOKCORE_SHARED(int, wrong, 1);
  TOKCORE_SHARED(acc_t, queries, kRows * Traits::kDim);
  TOKCORE_SHARED(acc_t, scores, kRows * kSlotsOfSplit);
  TOKCORE_SHARED(acc_t, of_warps, kSlotWarps * kRows * Traits::kDim);
  BlockSum<acc_t>* const sums = static_cast<BlockSum<acc_t>*>(p.sums);
  const int warp = warp_of_thread();
  const int64_t units = p.batch * p.heads * p.splits;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t split = unit % p.splits, kv_head = unit / p.splits;
    const int64_t b = kv_head / p.heads, h = kv_head % p.heads, list = p.list_of(b, h);
    const int64_t first = split * kSlotsOfSplit, left = p.count[list] - first;
    if (!p.has_valid_count(list) || left <= 0) continue;
    const int n = int(left < kSlotsOfSplit ? left : kSlotsOfSplit);
    const bool usable = load_slots(p, list, first, n, slots, wrong);
    for (int64_t g = 0; g < p.group(); g += kRows) {
      const int64_t head = kv_head * p.group() + g;
      const int rows = int(p.group() - g < kRows ? p.group() - g : kRows);
      if (!usable) {
        // Of the output nothing is known then, nor of the weights of the whole list.
        if (threadIdx.x < unsigned(rows))
          sums[(head + threadIdx.x) * p.splits + split] = {kNaN<acc_t>, kNaN<acc_t>};
        continue;
      }
      load_queries<T, kLanes>(p.query, p.type, head, rows, int(p.dim), queries);
      // The queries are written; the scores, and the sums of the warps, of those before are read.
      __syncthreads();
      split_scores<T, kLanes>(p, b, h, slots, n, queries, scores);
      // The scores are written; the queries are read.
      __syncthreads();
      for (int i = warp; i < rows; i += kSlotWarps) {
        acc_t* const kept = static_cast<acc_t*>(p.scores) + (head + i) * p.listed + first;
        const BlockSum<acc_t> found =
            warp_exponentials<acc_t>(scores + i * kSlotsOfSplit, n, [&](int j, acc_t exponential) {
              scores[i * kSlotsOfSplit + j] = kept[j] = exponential;
            });
        if (threadIdx.x % kWarpThreads == 0) sums[(head + i) * p.splits + split] = found;
      }
      // The exponentials are written.
      __syncthreads();
      acc_t out[kRows][kEntries] = {};
      const T* const values = p.value.head<T>(b, h);
      const float* const pairs = p.value.quantization == nullptr ? nullptr : p.value.pairs(b, h);
      for (int j = Traits::team(); j < n; j += Traits::kTeams) {
        const int slot = slots[j];
        acc_t y[kEntries];
        load_slot<T, kLanes>(values + slot * p.value.slot_stride,
                             pairs == nullptr ? nullptr : pairs + slot * p.value.slot_pairs,
                             int(p.dim), int(p.groups), y);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const acc_t weight = i < rows ? acc_t(scores[i * kSlotsOfSplit + j]) : acc_t(0);
#pragma unroll
          for (int k = 0; k < kEntries; ++k) out[i][k] += weight * y[k];
        }
      }
      store_combined<T, kLanes>(p, out, of_warps, head, split, rows);
    }
  }
}

// A block for each query head: the splits' sums, then the output.
template <typename Q>
__global__ void __launch_bounds__(kSlotThreads) decode_output_kernel(SparseDecodeParams p) {
  using acc_t = Acc<Q>;
  for (int64_t head = blockIdx.x; head < p.batch * p.query_heads; head += gridDim.x) {
    const int64_t list = p.list_of(head / p.query_heads, head % p.query_heads / p.group());
    const int64_t count = p.has_valid_count(list) ? p.count[list] : 0;
    const int64_t splits = (count + kSlotsOfSplit - 1) / kSlotsOfSplit;
    const BlockSum<acc_t>* const sums =
        static_cast<const BlockSum<acc_t>*>(p.sums) + head * p.splits;
    SoftmaxSum<acc_t> state;
    for (int64_t split = threadIdx.x; split < splits; split += kSlotThreads)
      state = merge(state, SoftmaxSum<acc_t>{sums[split].max, sums[split].sum, acc_t(0)}, acc_t(1));
    state = block_merge(state, acc_t(1));
    // Without a finite score the inverse makes everything NaN, as does a NaN among the sums.
    SoftmaxOfBlocks<acc_t> merged = {state.max, state.sum, acc_t(1) / state.sum};
    if (!p.has_valid_count(list)) merged = {kNaN<acc_t>, kNaN<acc_t>, kNaN<acc_t>};
    if (threadIdx.x == 0) {
      static_cast<acc_t*>(p.lse)[head] =
          count == 0 && p.has_valid_count(list) ? -kInfinity<acc_t> : merged.lse();
      static_cast<BlockSum<acc_t>*>(p.merged)[head] = {merged.max, merged.inverse};
    }
    for (int64_t d = threadIdx.x; d < p.dim; d += kSlotThreads) {
      const acc_t* const parts =
          static_cast<const acc_t*>(p.combined) + head * p.splits * p.dim + d;
      acc_t out = p.has_valid_count(list) ? acc_t(0) : kNaN<acc_t>;
      for (int64_t split = 0; split < splits; ++split)
        out += merged.factor(sums[split]) * parts[split * p.dim];
      static_cast<Q*>(p.output)[head * p.dim + d] = static_cast<Q>(out);
    }
  }
}

// A thread for each slot of a list.
template <typename acc_t>
__global__ void __launch_bounds__(kSlotThreads) decode_weight_kernel(SparseDecodeParams p) {
  const int64_t lists = p.batch * p.lists, stride = int64_t(gridDim.x) * kSlotThreads;
  for (int64_t list = blockIdx.y; list < lists; list += gridDim.y) {
    const int64_t count = p.has_valid_count(list) ? p.count[list] : 0;
    for (int64_t j = int64_t(blockIdx.x) * kSlotThreads + threadIdx.x; j < p.listed; j += stride) {
      acc_t weight = p.has_valid_count(list) ? acc_t(0) : kNaN<acc_t>;
      const int64_t first = list * p.heads_of_list;
      const int64_t last = j < count ? first + p.heads_of_list : first;
      // A double's exponential takes the registers of several heads at a time.
#pragma unroll 1
      for (int64_t head = first; head < last; ++head) {
        const BlockSum<acc_t> merged = static_cast<const BlockSum<acc_t>*>(p.merged)[head];
        const acc_t max =
            static_cast<const BlockSum<acc_t>*>(p.sums)[head * p.splits + j / kSlotsOfSplit].max;
        weight += static_cast<const acc_t*>(p.scores)[head * p.listed + j] *
                  (exp2_of((max - finite_anchor(merged.max)) * acc_t(kLog2E)) * merged.sum);
      }
      static_cast<acc_t*>(p.weight_row)[list * p.listed + j] = weight;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> sparse_decode_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& index,
    const Tensor& count, const std::optional<Tensor>& key_quantization,
    const std::optional<Tensor>& value_quantization, double scale) {
  const CachedCall call = checked_decode_call("sparse_decode_attention", query, key, value, index,
                                              count, key_quantization, value_quantization, scale);
  const DeviceGuard guard(device_index(query));
  SparseDecodeParams p{call.tensors, call.type, 0, 0, nullptr, nullptr, nullptr, nullptr};
  p.splits = (p.listed + kSlotsOfSplit - 1) / kSlotsOfSplit;
  p.heads_of_list = p.sharing();
  const int64_t heads = p.batch * p.query_heads;
  Tensor output = allocate_output(query, shape_of(query), call.type);
  Tensor weight_row = allocate_output(query, {p.batch, p.lists, p.listed}, call.statistics);
  Tensor lse = allocate_output(query, {p.batch, p.query_heads}, call.statistics);
  Tensor scores = allocate_output(query, {heads * p.listed}, call.statistics);
  Tensor combined = allocate_output(query, {heads * p.splits * p.dim}, call.statistics);
  Tensor sums = allocate_output(query, {heads * (p.splits + 1) * 2}, call.statistics);
  p.output = output.mutable_data_ptr();
  p.weight_row = weight_row.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.scores = scores.mutable_data_ptr();
  p.combined = combined.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  dispatch_cache(call.type, call.quantized(), p.dim, [&](auto entry, auto lanes) {
    launch(dim3(block_count(p.batch * p.heads * p.splits)), dim3(kSlotThreads), 0,
           current_stream(query), decode_split_kernel<decltype(entry), lanes.value>, p);
  });
  dispatch_logits(call.type, [&](auto entry) {
    using acc_t = Acc<decltype(entry)>;
    SparseDecodeParams q = p;
    q.merged = static_cast<BlockSum<acc_t>*>(p.sums) + heads * p.splits;
    launch(dim3(block_count(heads)), dim3(kSlotThreads), 0, current_stream(query),
           decode_output_kernel<decltype(entry)>, q);
    const int64_t lists = p.batch * p.lists;
    launch(dim3(block_count((p.listed + kSlotThreads - 1) / kSlotThreads),
                unsigned(lists < kMostLists ? lists : kMostLists)),
           dim3(kSlotThreads), 0, current_stream(query), decode_weight_kernel<acc_t>, q);
  });
  return {output, weight_row, lse};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("sparse_decode_attention", TORCH_BOX(&tokcore::sparse_decode_attention_cuda));
}
