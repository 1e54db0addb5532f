// Slots that are no longer needed taken out of every tensor of the state, in place. One kernel
// lists for each place the slot that goes there; the next moves, a block for each row of slots (a
// head's keys, a row of the ring), stretch by stretch: what a stretch reads lies at its own places
// or beyond, so nothing is written before it is read.
#include <torch/csrc/stable/library.h>

#include "common/kv_compact_call.h"
#include "common/namespace.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"
#include "cuda/primitives/units.cuh"

namespace tokcore {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads;
constexpr int kHeld = 4;  // units of a thread in a stretch: loads that are under way together

struct CompactLaunch : KvCompact {
  int32_t* source;          // (B, Hs, C): of each place the slot that goes there
  int32_t *before, *after;  // (B, Hs): slots in use; both 0 where the list is wrong
  int64_t rows;             // of all tensors
};

__global__ void __launch_bounds__(kThreads) kv_sources_kernel(CompactLaunch p) {
  // Of each warp how many slots it keeps; of two tiles in turn, so that a tile is written while the
  // one before is read.
  TOKCORE_SHARED(int, kept_of, 2 * kWarps);
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  for (int64_t list = blockIdx.x; list < p.sizes.all_lists(); list += gridDim.x) {
    const bool valid = p.valid(list);
    const int n = valid ? p.count[list] : 0;
    int32_t* const source = p.source + list * p.sizes.slots;
    int kept = 0, turn = 0;
    for (int begin = 0; begin < n; begin += kThreads) {
      const int slot = begin + int(threadIdx.x);
      const bool stays = slot < n && p.keeps_slot(list, slot);
      const unsigned votes = __ballot_sync(kWholeWarp, stays);
      if (lane == 0) kept_of[turn + warp] = __popc(votes);
      // The votes of all warps are written.
      __syncthreads();
      int at = kept + __popc(votes & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        const int more = kept_of[turn + w];
        at += w < warp ? more : 0;
        kept += more;
      }
      if (stays) source[at] = slot;
      turn = kWarps - turn;
    }
    // The count is read, and so are the votes.
    __syncthreads();
    if (threadIdx.x != 0) continue;
    p.before[list] = n;
    p.after[list] = kept;
    p.count[list] = valid ? kept : -1;
  }
}

// The slots of one row, in whole units of unit_t.
template <typename unit_t>
__device__ __forceinline__ void move_row(const CompactLaunch& p, const Moved& tensor, int64_t row) {
  const int64_t list = row / tensor.rows_of_list, of_slot = tensor.slot_bytes / sizeof(unit_t);
  const int32_t* const source = p.source + list * p.sizes.slots;
  unit_t* const units = reinterpret_cast<unit_t*>(tensor.row(row, p.sizes.slots));
  const int64_t end = p.after[list] * of_slot;
  for (int64_t begin = threadIdx.x; begin - threadIdx.x < end; begin += kHeld * kThreads) {
    unit_t held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t k = begin + i * kThreads, place = k / of_slot;
      if (k < end) held[i] = load_unit(units + source[place] * of_slot + k % of_slot);
    }
    // The stretch is read: what is written now may be among it.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t k = begin + i * kThreads;
      if (k < end) store_unit(units + k, held[i]);
    }
  }
  // All has been read that stays.
  if (tensor.left == Moved::kAsItIs) return;
  unit_t left;
  memset(static_cast<void*>(&left), tensor.left, sizeof left);
  for (int64_t k = end + threadIdx.x; k < p.before[list] * of_slot; k += kThreads)
    store_unit(units + k, left);
}

__global__ void __launch_bounds__(kThreads) kv_move_kernel(CompactLaunch p) {
  for (int64_t unit = blockIdx.x; unit < p.rows; unit += gridDim.x) {
    int64_t row = unit;
    int t = 0;
    for (; row >= p.tensors[t].rows; ++t) row -= p.tensors[t].rows;
    const Moved& tensor = p.tensors[t];
    const int64_t together = tensor.slot_bytes | int64_t(reinterpret_cast<uintptr_t>(tensor.data));
    if (together % 16 == 0) {
      move_row<Pack<uint32_t>>(p, tensor, row);
    } else if (together % 8 == 0) {
      move_row<uint64_t>(p, tensor, row);
    } else if (together % 4 == 0) {
      move_row<uint32_t>(p, tensor, row);
    } else if (together % 2 == 0) {
      move_row<uint16_t>(p, tensor, row);
    } else {
      move_row<uint8_t>(p, tensor, row);
    }
  }
}

void kv_compact_cuda(Tensor key, Tensor value, Tensor position, Tensor score, Tensor ring,
                     Tensor last_selected, Tensor count, const Tensor& since, const Tensor& local,
                     int64_t sinks, std::optional<Tensor> key_quantization,
                     std::optional<Tensor> value_quantization) {
  const KvCompactCall call =
      checked_compact("kv_compact", key, value, position, score, ring, last_selected, count, since,
                      local, sinks, key_quantization, value_quantization);
  const DeviceGuard guard(device_index(key));
  const Shape lists = {2, call.p.sizes.all_lists()};
  Tensor source = allocate_output(key, shape_of(position), ScalarType::Int);
  Tensor sizes = allocate_output(key, lists, ScalarType::Int);
  CompactLaunch p{call.p, static_cast<int32_t*>(source.mutable_data_ptr()),
                  static_cast<int32_t*>(sizes.mutable_data_ptr()), nullptr, 0};
  p.after = p.before + lists[1];
  for (int t = 0; t < p.moved; ++t) p.rows += p.tensors[t].rows;
  const Stream stream = current_stream(key);
  launch(dim3(block_count(lists[1])), dim3(kThreads), 0, stream, kv_sources_kernel, p);
  launch(dim3(block_count(p.rows)), dim3(kThreads), 0, stream, kv_move_kernel, p);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("kv_compact", TORCH_BOX(&tokcore::kv_compact_cuda));
}
