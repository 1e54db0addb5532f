// Rewards against their groups, in one launch. A group is a run of rows, found where it starts: a
// block takes as many positions as it has threads, and every group that starts there. Short groups
// are a thread's work, long ones the whole block's, one after the other.
#include <torch/csrc/stable/library.h>

#include "common/advantage_call.h"
#include "common/namespace.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

// A thread that walks this far alone costs less than a block's barriers do.
constexpr int64_t kShortGroup = 64;

// Where the group that starts at `begin` ends, as far as `most` positions after it.
template <typename T>
__device__ __forceinline__ int64_t short_end(const AdvantageTensors<T>& p, int64_t begin,
                                             int64_t most) {
  if (p.group_size > 0) return begin + p.group_size;
  int64_t end = begin + 1;
  while (end < p.rows && end - begin <= most && !p.starts(end)) ++end;
  return end;
}

// The same by a whole block, however far it is.
template <typename T>
__device__ __forceinline__ int64_t long_end(const AdvantageTensors<T>& p, int64_t begin) {
  if (p.group_size > 0) return begin + p.group_size;
  TOKCORE_SHARED(long long, found, 1);
  for (int64_t from = begin + 1; from < p.rows; from += blockDim.x) {
    const int64_t position = from + threadIdx.x;
    // Everyone has read what the step before this one found.
    __syncthreads();
    if (threadIdx.x == 0) found[0] = p.rows;
    __syncthreads();
    if (position < p.rows && p.starts(position)) atomicMin(&found[0], (long long)position);
    // The nearest start is known.
    __syncthreads();
    const int64_t end = found[0];
    if (end < p.rows) return end;
  }
  return p.rows;
}

template <typename T>
__device__ __forceinline__ void run_long_group(const AdvantageTensors<T>& p, int64_t begin,
                                               int64_t end) {
  const double anchor = find_anchor(p, begin, end);
  GroupSums sums;
  TopTwo<double> top;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)
    add_reward(p, p.row(i), anchor, sums, top);
  sums = block_sum(sums);
  if (p.rules.center == Center::kBest) top = block_merge(top, 0.0);
  GroupStatistics group = group_statistics(p.rules, anchor, sums, top);
  GroupSquares squares;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)
    add_square(p, p.row(i), group, squares);
  set_deviation(p.rules, block_sum(squares), group);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) put_advantage(p, p.row(i), group);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) group_advantage_kernel(AdvantageTensors<T> p) {
  TOKCORE_SHARED(int, is_long, kMaxThreads);
  const int64_t tile = int64_t(blockIdx.x) * blockDim.x, begin = tile + threadIdx.x;
  is_long[threadIdx.x] = 0;
  if (begin < p.rows && p.starts(begin)) {
    const int64_t end = short_end(p, begin, kShortGroup);
    if (end - begin > kShortGroup) {
      is_long[threadIdx.x] = 1;
    } else {
      run_group(p, begin, end);
    }
  }
  // The marks are written.
  __syncthreads();
  for (int i = 0; i < int(blockDim.x); ++i) {
    if (is_long[i] != 0) run_long_group(p, tile + i, long_end(p, tile + i));
  }
}

std::tuple<Tensor, Tensor, Tensor> group_advantage_cuda(
    const Tensor& rewards, const std::optional<Tensor>& group, const std::optional<Tensor>& order,
    const std::optional<Tensor>& weights, int64_t group_size, int64_t center, int64_t scale,
    int64_t ddof, int64_t singleton, double eps,
    bool /* contiguous: Python has sorted what is not */, bool with_statistics) {
  const AdvantageCall call = checked_advantage("group_advantage", rewards, group, order, weights,
                                               group_size, center, scale, ddof, singleton, eps);
  const DeviceGuard guard(device_index(rewards));
  const Shape shape = {call.rows}, none = {0};
  const ScalarType type = rewards.scalar_type();
  Tensor advantage = allocate_output(rewards, shape, type);
  Tensor mean = allocate_output(rewards, with_statistics ? shape : none, type);
  Tensor deviation = allocate_output(rewards, with_statistics ? shape : none, type);
  // A block for each tile: a grid can have more blocks than there is memory for.
  const unsigned tiles = unsigned((call.rows + kMaxThreads - 1) / kMaxThreads);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(dim3(tiles), dim3(kMaxThreads), 0, current_stream(rewards), group_advantage_kernel<T>,
           call.tensors<T>(advantage, mean, deviation));
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {advantage, mean, deviation};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("group_advantage", TORCH_BOX(&tokcore::group_advantage_cuda));
}
