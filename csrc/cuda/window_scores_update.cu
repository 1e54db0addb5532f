// Windowed sums of attention weights, brought one step on: a block for each stretch of slots of a
// list. A thread holds a slot's sum while rows leave and enter; which entry of the index lists a
// slot is found once for all rows, by writing the entries where their slots are.
#include <torch/csrc/stable/library.h>

#include "common/namespace.h"
#include "common/window_scores_update_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

constexpr int kThreads = 256;
constexpr int kSlots = 512;  // of a block: enough of them to fill a GPU with a list or two
static_assert(kSlots % kThreads == 0, "threads clear and update the same number of slots");
constexpr int kNone = -1;

TOKCORE_KV_HD int64_t stretches(const WindowUpdate& p) {
  return (p.sizes.slots + kSlots - 1) / kSlots;
}

// The entries of the index that list the slots from `begin` on; whether it is one at all.
__device__ __forceinline__ bool find_entries(const WindowUpdate& p, int64_t list, int64_t begin,
                                             Shared<int> entries) {
  TOKCORE_SHARED(int, wrong, 1);
  // Everyone has read the entries before these.
  __syncthreads();
  for (int k = threadIdx.x; k < kSlots; k += kThreads) entries[k] = kNone;
  if (threadIdx.x == 0) wrong[0] = 0;
  // They are clear.
  __syncthreads();
  const int32_t* const index = p.index + list * p.listed;
  for (int64_t m = threadIdx.x; m < p.count[list]; m += kThreads) {
    const int64_t slot = index[m], before = m == 0 ? -1 : int64_t(index[m - 1]);
    if (slot < 0 || slot >= p.sizes.slots || before >= slot) atomicExch(&wrong[0], 1);
    // Where the index is wrong two may want one place: an exchange is no race.
    if (slot >= begin && slot < begin + kSlots) atomicExch(&entries[slot - begin], int(m));
  }
  // They are written.
  __syncthreads();
  return int(wrong[0]) == 0;
}

// Rows that leave and enter, for one slot. `entry`: of the weights; kNone where it is not listed.
__device__ __forceinline__ void update_slot(const WindowUpdate& p, const WindowStep& at,
                                            int64_t list, int64_t slot, int64_t entry) {
  int64_t sum = p.score[list * p.sizes.slots + slot];
  bool known = true;
  for (int64_t t = at.oldest; t < at.leaving_end(); ++t) {
    float* const weight = p.ring_row(list, t) + slot;
    known = known && is_weight(*weight);
    sum = wrapping_sum(sum, -fixed_point(*weight));
    *weight = 0;
  }
  for (int64_t query = 0; query < p.queries; ++query) {
    if (!at.enters(query)) continue;
    const bool weighed =
        entry != kNone && (p.index != nullptr || entry < at.visible(query, p.count[list]));
    const float weight = weighed ? p.weights(list, query)[entry] : 0.0f;
    known = known && is_weight(weight);
    sum = wrapping_sum(sum, fixed_point(weight));
    if (p.ring_rows > 0) p.ring_row(list, at.step_of(query))[slot] = weight;
  }
  p.score[list * p.sizes.slots + slot] = known ? sum : -1;
  if (entry == kNone || p.queries == 0) return;
  int32_t& last = p.last_selected[list * p.sizes.slots + slot];
  if (last < at.step) last = int32_t(at.step);
}

__device__ __forceinline__ void refuse_slot(const WindowUpdate& p, int64_t list, int64_t slot) {
  p.score[list * p.sizes.slots + slot] = -1;
  p.last_selected[list * p.sizes.slots + slot] = -1;
  for (int64_t t = 0; t < p.ring_rows; ++t) p.ring_row(list, t)[slot] = NAN;
}

// Registers for four blocks a processor: without a number the compiler aims higher and spills.
__global__ void __launch_bounds__(kThreads, 4) window_scores_kernel(WindowUpdate p) {
  TOKCORE_SHARED(int, entries, kSlots);
  for (int64_t unit = blockIdx.x; unit < p.sizes.all_lists() * stretches(p); unit += gridDim.x) {
    const int64_t list = unit / stretches(p), begin = unit % stretches(p) * kSlots;
    const int64_t n = p.count[list];
    const WindowStep at = p.step_of_row(list / p.sizes.lists);
    bool valid = at.valid() && n >= 0 && n <= p.listed;
    if (valid && p.index != nullptr) valid = find_entries(p, list, begin, entries);
    for (int k = threadIdx.x; k < kSlots && begin + k < p.sizes.slots; k += kThreads) {
      const int64_t slot = begin + k;
      if (!valid) {
        refuse_slot(p, list, slot);
      } else if (p.index != nullptr) {
        update_slot(p, at, list, slot, int(entries[k]));
      } else {
        update_slot(p, at, list, slot, slot < n ? slot : kNone);
      }
    }
  }
}

// A kernel of its own: every list of a row reads what this writes.
__global__ void __launch_bounds__(kThreads) window_oldest_kernel(WindowUpdate p) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x; b < p.sizes.batch; b += step) {
    const WindowStep at = p.step_of_row(b);
    p.oldest[b] = at.valid() ? int32_t(at.oldest_after()) : -1;
  }
}

void window_scores_update_cuda(Tensor score, Tensor ring, Tensor last_selected, Tensor oldest,
                               const Tensor& rows, const std::optional<Tensor>& index,
                               const Tensor& count, const Tensor& step, const Tensor& window) {
  const WindowUpdateCall call = checked_window_update(
      "window_scores_update", score, ring, last_selected, oldest, rows, index, count, step, window);
  const WindowUpdate& p = call.p;
  const DeviceGuard guard(device_index(score));
  const Stream stream = current_stream(score);
  launch(dim3(block_count(p.sizes.all_lists() * stretches(p))), dim3(kThreads), 0, stream,
         window_scores_kernel, p);
  launch(dim3(block_count((p.sizes.batch + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream,
         window_oldest_kernel, p);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("window_scores_update", TORCH_BOX(&tokcore::window_scores_update_cuda));
}
