// Small kernels, each twice: with one planted bug, which the emulation has to report, and mended,
// when it has to pass with the right result under every seed. They are ordinary kernels of the
// vocabulary.
#pragma once

#include <cstdint>

#include "cuda/primitives/device.h"

namespace tokcore {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 96;  // of a block, where a case does not say otherwise
constexpr int kWarps = kThreads / 32;
constexpr int kValues = 4096;

struct Params {
  const float* in;  // 0, 1, 2 ... kValues - 1
  float* out;       // one a thread of the grid
};

__device__ __forceinline__ int thread_in_block() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

__device__ __forceinline__ int thread_in_grid() {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return static_cast<int>(block * blockDim.x * blockDim.y * blockDim.z) + thread_in_block();
}

// Reads what a thread of another warp has to have written.
template <bool kBug>
__global__ void missing_barrier(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  if (!kBug) __syncthreads();
  p.out[thread_in_grid()] = tile[kThreads - 1 - t];
}

// The second round overwrites what a slow thread still reads from the first.
template <bool kBug>
__global__ void missing_second_barrier(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[t] = p.in[t];
    __syncthreads();
    sum += tile[(t + 32) % kThreads];
    if (!kBug) __syncthreads();
  }
  p.out[thread_in_grid()] = sum;
}

template <bool kBug>
__global__ void unsynchronised_sum(Params p) {
  TOKCORE_SHARED(unsigned, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  if (kBug) {
    total[0] += 1;
  } else {
    atomicAdd(&total[0], 1);
  }
  __syncthreads();
  p.out[thread_in_grid()] = static_cast<float>(total[0]);
}

// One element for each kind; the bug is that thread 0 prepares them beside the others.
template <bool kBug>
__global__ void atomic_kinds(Params p) {
  TOKCORE_SHARED(unsigned, v, 7);
  const unsigned t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < 7; ++i) v[i] = i == 0 || i == 3 ? ~0u : 0u;
  }
  if (!kBug) __syncthreads();
  atomicAnd(&v[0], ~(1u << t % 32));
  atomicOr(&v[1], 1u << t % 32);
  atomicXor(&v[2], t);
  atomicMin(&v[3], t + 5);
  atomicMax(&v[4], t + 5);
  if (t == 7) atomicExch(&v[5], 70);
  atomicCAS(&v[6], t == 9 ? 0u : 1u, 90u);
  __syncthreads();
  p.out[thread_in_grid()] =
      static_cast<float>(v[0] + 1 + ~v[1] - 1 + v[2] + v[3] + v[4] + v[5] + v[6]);
}

// An atomic does not protect the plain read beside it.
template <bool kBug>
__global__ void atomic_beside_read(Params p) {
  TOKCORE_SHARED(unsigned, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  if (threadIdx.x != 40) atomicAdd(&total[0], 1);
  if (!kBug) __syncthreads();
  const float seen = threadIdx.x == 40 ? static_cast<float>(total[0]) : 0.0f;
  p.out[thread_in_grid()] = seen;
}

template <bool kBug>
__global__ void out_of_bounds_read(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  __syncthreads();
  const int next = kBug || t + 1 < kThreads ? t + 1 : 0;
  p.out[thread_in_grid()] = tile[next];
}

// Inside the allocation, but outside the view.
template <bool kBug>
__global__ void out_of_bounds_dynamic(Params p) {
  Shared<float> first = dynamic_shared<float>(kThreads);
  Shared<float> second = dynamic_shared<float>(kThreads, kThreads * sizeof(float));
  const int t = threadIdx.x;
  second[t] = p.in[t];
  (kBug ? first + 1 : first)[t] = -p.in[t];
  __syncthreads();
  p.out[thread_in_grid()] = second[t];
}

template <bool kBug>
__global__ void dynamic_beyond_launch(Params p) {
  Shared<float> tile = dynamic_shared<float>(kThreads, kBug ? 2 * kThreads * sizeof(float) : 0);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  p.out[thread_in_grid()] = tile[t];
}

template <bool kBug>
__global__ void too_much_shared(Params p) {
  TOKCORE_SHARED(float, tile, kBug ? 49152 / sizeof(float) + 1 : kThreads);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  p.out[thread_in_grid()] = tile[t];
}

// For launches that are themselves the bug.
__global__ void innocent(Params p) { p.out[thread_in_grid()] = p.in[threadIdx.x]; }

template <bool kBug>
__global__ void divergent_barrier(Params p) {
  if (kBug) {
    if (threadIdx.x < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  p.out[thread_in_grid()] = p.in[threadIdx.x];
}

template <bool kBug>
__global__ void skipped_barrier(Params p) {
  if (!kBug || threadIdx.x < 40) __syncthreads();
  p.out[thread_in_grid()] = p.in[threadIdx.x];
}

template <bool kBug>
__global__ void early_return(Params p) {
  p.out[thread_in_grid()] = p.in[threadIdx.x];
  if (kBug && threadIdx.x == 77) return;
  __syncthreads();
}

template <bool kBug>
__global__ void shuffle_outside_mask(Params p) {
  const int lane = threadIdx.x % 32;
  float x = p.in[threadIdx.x];
  const unsigned low_half = 0x0000ffffu;
  if (lane < 16) x = __shfl_xor_sync(low_half, x, kBug ? 16 : 15);
  p.out[thread_in_grid()] = x;
}

template <bool kBug>
__global__ void shuffle_absent_lanes(Params p) {
  const int lane = threadIdx.x % 32;
  float x = p.in[threadIdx.x];
  if (lane < 16) x = __shfl_xor_sync(kBug ? kAllLanes : 0x0000ffffu, x, 15);
  p.out[thread_in_grid()] = x;
}

// With 80 threads the last warp has 16 lanes; lane 20 of it can be named but not read.
template <bool kBug>
__global__ void shuffle_partial_warp(Params p) {
  const int lane = threadIdx.x % 32;
  const float x = __shfl_sync(kAllLanes, p.in[threadIdx.x], kBug ? lane ^ 16 : lane ^ 15);
  p.out[thread_in_grid()] = x;
}

// All the shuffles within segments of eight lanes. An xor past the segment, and a step over its
// end, give the lane's own value.
template <bool kBug>
__global__ void shuffle_segments(Params p) {
  const double x = p.in[threadIdx.x];
  const int width = kBug ? 12 : 8;
  double sum = __shfl_sync(kAllLanes, x, 11, width);
  sum += 100 * __shfl_up_sync(kAllLanes, x, 3, width);
  sum += 10000 * __shfl_down_sync(kAllLanes, x, 3, width);
  sum += 1000000 * __shfl_xor_sync(kAllLanes, static_cast<int64_t>(x), 9, width);
  p.out[thread_in_grid()] = static_cast<float>(sum / 8);
}

template <bool kBug>
__global__ void vote_without_caller(Params p) {
  const int lane = threadIdx.x % 32;
  float x = 0;
  if (lane < 16) x = static_cast<float>(__ballot_sync(kBug ? 0xfff0u : 0xffffu, lane % 2));
  p.out[thread_in_grid()] = x;
}

// Both halves of the warp are in a warp function with the same mask, but not in the same one.
template <bool kBug>
__global__ void mixed_collectives(Params p) {
  const int lane = threadIdx.x % 32;
  float x = 0;
  if (kBug && lane < 16) {
    x = static_cast<float>(__any_sync(kAllLanes, lane == 3));
  } else {
    x = static_cast<float>(__all_sync(kAllLanes, lane < 32));
  }
  p.out[thread_in_grid()] = x;
}

template <bool kBug>
__global__ void misaligned_load(Params p) {
  const float* from = p.in + (kBug ? 1 : 4);
  Pack<float> pack = load16(from);
  p.out[thread_in_grid()] = pack[0] + pack[3];
}

template <bool kBug>
__global__ void misaligned_shared_store(Params p) {
  TOKCORE_SHARED(float, tile, kThreads * 4);
  const int t = threadIdx.x;
  store16_shared(tile, 4 * t + (kBug && t == 5 ? 2 : 0), load16(p.in + 4 * t));
  __syncthreads();
  p.out[thread_in_grid()] = tile[t];
}

template <bool kBug>
__global__ void uninitialised_shared(Params p) {
  TOKCORE_SHARED(float, partials, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) partials[warp] = p.in[warp];
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < (kBug ? 32 : kWarps); ++w) sum += partials[w];
  p.out[thread_in_grid()] = sum;
}

// The second block finds nothing of what the first one wrote.
template <bool kBug>
__global__ void left_by_another_block(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  if (!kBug || blockIdx.x == 0) tile[threadIdx.x] = p.in[threadIdx.x];
  p.out[thread_in_grid()] = tile[threadIdx.x];
}

// Lanes of one warp may talk through shared memory, with a __syncwarp in between; a shuffle does
// not do.
template <bool kBug>
__global__ void missing_syncwarp(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  if (kBug) {
    (void)__shfl_xor_sync(kAllLanes, 1, 1);
  } else {
    __syncwarp();
  }
  const float neighbour = tile[t ^ 1];
  __syncwarp();
  tile[t] = neighbour;
  p.out[thread_in_grid()] = neighbour;
}

// And a __syncwarp orders nothing between two warps.
template <bool kBug>
__global__ void syncwarp_across_warps(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  __syncwarp();
  p.out[thread_in_grid()] = tile[kBug ? (t + 32) % kThreads : t ^ 31];
}

// Nor between the two halves of one that it was called for.
template <bool kBug>
__global__ void syncwarp_of_half(Params p) {
  TOKCORE_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = p.in[t];
  __syncwarp(t % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  p.out[thread_in_grid()] = tile[t ^ (kBug ? 31 : 15)];
}

// An index one past a pack.
template <bool kBug>
__global__ void pack_index(Params p) {
  Pack<float> pack = load16(p.in);
  for (int i = 0; i < Pack<float>::kSize + kBug; ++i) pack[i] = 1.0f;
  p.out[thread_in_grid()] = pack[0];
}

// Reads one element more than there are: for AddressSanitizer to see.
__global__ void read_past_end(Params p) { p.out[thread_in_grid()] = p.in[kValues]; }

// Everything at once, as a real kernel uses it: warp sums by shuffles, a block sum through shared
// memory, two rounds.
template <bool kBug>
__global__ void block_sum(Params p) {
  TOKCORE_SHARED(double, partials, 32);
  const int warp = thread_in_block() / 32, lane = thread_in_block() % 32;
  const int warps = (blockDim.x * blockDim.y * blockDim.z + 31) / 32;
  double total = 0;
  for (int round = 0; round < 2; ++round) {
    double sum = p.in[thread_in_block()];
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(kAllLanes, sum, delta);
    if (lane == 0) partials[warp] = sum;
    if (!kBug) __syncthreads();
    for (int w = 0; w < warps; ++w) total += partials[w];
    __syncthreads();
  }
  p.out[thread_in_grid()] = static_cast<float>(total);
}

}  // namespace
}  // namespace tokcore
