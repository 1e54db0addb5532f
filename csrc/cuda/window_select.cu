// Which slots a query attends to, a block for each list. Eight bits of the scores at a time, from
// the first in which two of them differ: a histogram says in which of the digits the least score
// that is taken lies. Then one pass in the order of slots writes those that are taken, each at the
// place that the votes of the threads before it give.
#include <torch/csrc/stable/library.h>

#include "common/namespace.h"
#include "common/window_select_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarpThreads;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits, kDigitsOfLane = kDigits / kWarpThreads;
static_assert(kDigits <= kThreads && kDigits % kWarpThreads == 0 && 64 % kDigitBits == 0,
              "a thread clears a digit, a lane sums several, digits fill a key");

// Keys above `key` are taken, and the first `ties` that are equal to it.
struct Threshold {
  uint64_t key;
  int ties;
};

// The bits that any thread has set, in every thread.
__device__ __forceinline__ uint64_t block_or(uint64_t bits) {
  TOKCORE_SHARED(unsigned long long, of_block, 1);
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
    bits |= __shfl_xor_sync(kWholeWarp, static_cast<unsigned long long>(bits), lanes);
  // Everyone has read the bits before these.
  __syncthreads();
  if (threadIdx.x == 0) of_block[0] = 0;
  // They are cleared.
  __syncthreads();
  if (threadIdx.x % kWarpThreads == 0)
    atomicOr(&of_block[0], static_cast<unsigned long long>(bits));
  // They are all set.
  __syncthreads();
  return of_block[0];
}

// For the `wanted` greatest of more keys than that.
__device__ __forceinline__ Threshold threshold_of(const int64_t* score, const Selection& chosen,
                                                  int wanted) {
  TOKCORE_SHARED(int, tally, kDigits);
  TOKCORE_SHARED(int, found, 3);  // the digit, how many keys are above it, how many have it
  const uint64_t origin = score_key(score[chosen.first]);
  uint64_t different = 0;
  for (int64_t j = chosen.first + threadIdx.x; j < chosen.last; j += kThreads)
    different |= score_key(score[j]) ^ origin;
  different = block_or(different);
  if (different == 0) return {origin, wanted};
  int shift = (63 - __clzll(static_cast<long long>(different))) / kDigitBits * kDigitBits;
  // Two shifts: one of 64 bits is none.
  uint64_t known = origin >> shift >> kDigitBits;
  while (true) {
    for (int d = threadIdx.x; d < kDigits; d += kThreads) tally[d] = 0;
    // The tally is clear.
    __syncthreads();
    // Neighbours often agree, most of all in 0: a thread counts what it sees in a row, and adds
    // once.
    int last = -1, times = 0;
    for (int64_t j = chosen.first + threadIdx.x; j < chosen.last; j += kThreads) {
      const uint64_t key = score_key(score[j]);
      if (key >> shift >> kDigitBits != known) continue;
      const int digit = int(key >> shift) & (kDigits - 1);
      if (digit != last && times > 0) atomicAdd(&tally[last], times);
      times = digit == last ? times + 1 : 1;
      last = digit;
    }
    if (times > 0) atomicAdd(&tally[last], times);
    // All keys are counted.
    __syncthreads();
    if (threadIdx.x < kWarpThreads) {
      // Lane 0 has the greatest digits.
      const int greatest = kDigits - 1 - int(threadIdx.x) * kDigitsOfLane;
      int mine = 0;
      for (int i = 0; i < kDigitsOfLane; ++i) mine += tally[greatest - i];
      int until = mine;
      for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) {
        const int other = __shfl_up_sync(kWholeWarp, until, lanes);
        if (int(threadIdx.x) >= lanes) until += other;
      }
      int above = until - mine;
      if (above < wanted && wanted <= until) {
        int digit = greatest;
        for (; above + int(tally[digit]) < wanted; --digit) above += tally[digit];
        found[0] = digit;
        found[1] = above;
        found[2] = int(tally[digit]);
      }
    }
    // The digit is found.
    __syncthreads();
    known = known << kDigitBits | uint64_t(int(found[0]));
    wanted -= int(found[1]);
    if (shift == 0 || wanted == int(found[2])) return {known << shift, wanted};
    shift -= kDigitBits;
  }
}

// Slots that are taken, from `next` on in their order.
__device__ __forceinline__ void write_ranked(const int64_t* score, const Selection& chosen,
                                             const Threshold& least, int32_t* next) {
  // Of each warp how many keys are above, and equal; of two tiles in turn, so that a tile is
  // written while the one before is read.
  TOKCORE_SHARED(int, above_of, 2 * kWarps);
  TOKCORE_SHARED(int, equal_of, 2 * kWarps);
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const unsigned before = (1u << lane) - 1;
  int above = 0, equal = 0, turn = 0;  // of the tiles before this one
  for (int64_t begin = chosen.first; begin < chosen.last; begin += kThreads) {
    const int64_t j = begin + threadIdx.x;
    const uint64_t key = j < chosen.last ? score_key(score[j]) : 0;
    const bool is_above = j < chosen.last && key > least.key;
    const bool is_equal = j < chosen.last && key == least.key;
    const unsigned all_above = __ballot_sync(kWholeWarp, is_above);
    const unsigned all_equal = __ballot_sync(kWholeWarp, is_equal);
    if (lane == 0) {
      above_of[turn + warp] = __popc(all_above);
      equal_of[turn + warp] = __popc(all_equal);
    }
    // The votes of all warps are written.
    __syncthreads();
    int above_here = above + __popc(all_above & before);
    int equal_here = equal + __popc(all_equal & before);
    for (int w = 0; w < kWarps; ++w) {
      const int more_above = above_of[turn + w], more_equal = equal_of[turn + w];
      above_here += w < warp ? more_above : 0;
      equal_here += w < warp ? more_equal : 0;
      above += more_above;
      equal += more_equal;
    }
    if (is_above || (is_equal && equal_here < least.ties))
      next[above_here + min(equal_here, least.ties)] = int32_t(j);
    turn = kWarps - turn;
  }
}

__global__ void __launch_bounds__(kThreads) window_select_kernel(SelectTensors p) {
  for (int64_t list = blockIdx.x; list < p.sizes.all_lists(); list += gridDim.x) {
    int32_t* const index = p.index + list * p.size;
    const bool valid = p.valid(list);
    const Selection chosen = valid ? p.selection(list) : Selection{0, 0, 0, 0};
    const int64_t selected = chosen.selected();
    for (int64_t i = threadIdx.x; i < p.size; i += kThreads) {
      if (i < chosen.first) index[i] = int32_t(i);
      if (i >= chosen.first + chosen.ranked)
        index[i] = i < selected ? int32_t(chosen.count - selected + i) : -1;
    }
    if (threadIdx.x == 0) p.selected[list] = valid ? int32_t(selected) : -1;
    if (chosen.ranked == 0) continue;  // for the whole block
    const int64_t* const score = p.score + list * p.sizes.slots;
    const int64_t between = chosen.last - chosen.first;
    Threshold least = {0, int(between)};  // takes them all
    if (chosen.ranked < between) least = threshold_of(score, chosen, int(chosen.ranked));
    write_ranked(score, chosen, least, index + chosen.first);
    // The votes are read, so that the next list may write them.
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor> window_select_cuda(const Tensor& score, const Tensor& count,
                                              const Tensor& local, const Tensor& top, int64_t size,
                                              int64_t sinks) {
  SelectCall call = checked_select("window_select", score, count, local, top, size, sinks);
  SelectTensors& p = call.p;
  const DeviceGuard guard(device_index(score));
  Tensor index = allocate_output(score, with_last(call.lists(), size), ScalarType::Int);
  Tensor selected = allocate_output(score, call.lists(), ScalarType::Int);
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.selected = static_cast<int32_t*>(selected.mutable_data_ptr());
  launch(dim3(block_count(p.sizes.all_lists())), dim3(kThreads), 0, current_stream(score),
         window_select_kernel, p);
  return {index, selected};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("window_select", TORCH_BOX(&tokcore::window_select_cuda));
}
