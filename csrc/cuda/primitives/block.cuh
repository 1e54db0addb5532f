// Merges of running statistics across the threads of a block. The order is fixed, so a result
// depends on the number of threads alone.
#pragma once

#include <cstring>

#include "common/fields.h"
#include "common/online_softmax.h"
#include "cuda/primitives/device.h"

namespace tokcore {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarpThreads;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The warp that this thread is of. A compiler that does not know that all lanes agree makes a call
// of each shuffle that hangs on it, and spills registers around it.
__device__ __forceinline__ int warp_of_thread() {
  return __shfl_sync(kWholeWarp, int(threadIdx.x) / kWarpThreads, 0);
}

// A state is a handful of accumulators: SoftmaxSum or KlState.
template <template <typename> class State, typename acc_t>
__device__ __forceinline__ State<acc_t> shuffle_down(State<acc_t> state, int lanes) {
  constexpr int kWords = sizeof(State<acc_t>) / sizeof(acc_t);
  acc_t words[kWords];
  memcpy(words, &state, sizeof state);
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(kWholeWarp, words[i], lanes);
  memcpy(&state, words, sizeof state);
  return state;
}

// Lane 0 gets the merge of lanes [0, lanes), a power of two.
template <template <typename> class State, typename acc_t>
__device__ __forceinline__ State<acc_t> warp_merge(State<acc_t> state, int lanes, acc_t scale) {
  // A merge is hundreds of instructions: one copy of them.
#pragma unroll 1
  for (int delta = lanes / 2; delta > 0; delta /= 2) {
    state = merge(state, shuffle_down(state, delta), scale);
  }
  return state;
}

// The merge of every thread's state, in every thread. blockDim.x is a power of two, at least a
// warp.
template <template <typename> class State, typename acc_t>
__device__ __forceinline__ State<acc_t> block_merge(State<acc_t> state, acc_t scale) {
  TOKCORE_SHARED(State<acc_t>, of_warps, kMaxWarps);
  TOKCORE_SHARED(State<acc_t>, of_block, 1);
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int warps = blockDim.x / kWarpThreads;
  state = warp_merge(state, kWarpThreads, scale);
  if (lane == 0) of_warps[warp] = state;
  // The warps' states are written; and everyone has read the block's state of the row before this
  // one.
  __syncthreads();
  if (warp == 0) {
    // Lanes beyond `warps` bring nothing: an empty state merges away.
    state = lane < warps ? State<acc_t>(of_warps[lane]) : State<acc_t>();
    state = warp_merge(state, warps, scale);
    if (lane == 0) of_block[0] = state;
  }
  // The block's state is written; and the warps' states are read, so that the next row may write
  // them.
  __syncthreads();
  return State<acc_t>(of_block[0]);
}

// The sum over all threads of a struct of doubles, field by field, in every thread.
template <typename Sums>
__device__ __forceinline__ Sums block_sum(Sums sums) {
  constexpr int kWords = kFields<Sums>;
  TOKCORE_SHARED(double, of_warps, kMaxWarps* kWords);
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int warps = blockDim.x / kWarpThreads;
  double words[kWords];
  memcpy(words, &sums, sizeof sums);
  for (int delta = kWarpThreads / 2; delta > 0; delta /= 2) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] += __shfl_down_sync(kWholeWarp, words[i], delta);
  }
  // Everyone has read the sums before these.
  __syncthreads();
  if (lane == 0) {
    for (int i = 0; i < kWords; ++i) of_warps[warp * kWords + i] = words[i];
  }
  // The sums of all warps are written.
  __syncthreads();
  for (int i = 0; i < kWords; ++i) {
    words[i] = 0;
    for (int w = 0; w < warps; ++w) words[i] += of_warps[w * kWords + i];
  }
  memcpy(static_cast<void*>(&sums), words, sizeof sums);
  return sums;
}

}  // namespace
}  // namespace tokcore
