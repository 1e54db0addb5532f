// The best partition of rows and columns into groups: a block an item, several threads a cell.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/monotonic_align.h"
#include "common/namespace.h"
#include "cuda/primitives/lattice.cuh"

namespace tokcore {
namespace {

// Scratch of a block, for one item of `lanes` x `steps` at a time; cells and lane sums have a row
// of lanes + 1 for each step.
template <typename T>
struct AlignScratch {
  T *cells, *lane_sums, *step_sums, *lane_costs, *step_costs;
  int16_t *lane_least, *step_least;  // groups may begin here, after forbidden scores
  int16_t *moves, *path;

  TOKCORE_LATTICE_HD static int64_t reals(int64_t lanes, int64_t steps) {
    return 3 * (steps + 1) * (lanes + 1) + lanes + 1 + steps + 1;
  }
  TOKCORE_LATTICE_HD static int64_t shorts(int64_t lanes, int64_t steps) {
    return 3 * (steps + 1) * (lanes + 1) + lanes + steps;
  }
  TOKCORE_LATTICE_HD AlignScratch(T* real, int16_t* small, int64_t lanes, int64_t steps) {
    const int64_t square = (steps + 1) * (lanes + 1);
    cells = real;
    lane_sums = cells + square;
    step_sums = lane_sums + square;
    lane_costs = step_sums + square;
    step_costs = lane_costs + lanes + 1;
    lane_least = small;
    step_least = lane_least + square;
    moves = step_least + square;
    path = moves + square;
  }
};

template <typename In, typename T>
struct AlignParams {
  AlignTensors<In, T> out;
  T* reals;
  int16_t* shorts;
  int64_t reals_per_block, shorts_per_block;
};

// One item as the threads see it.
template <typename In>
struct AlignItem {
  const In* scores;
  int64_t lane_stride, step_stride, lanes, steps;
  bool lanes_first;

  __device__ __forceinline__ In score(int64_t lane, int64_t step) const {
    return scores[lane * lane_stride + step * step_stride];
  }
};

template <typename T>
struct Candidate {
  T value;
  int begin;

  // Offered in the order of `begin`.
  __device__ __forceinline__ void offer(T other, int at) {
    if (other > value) {
      value = other;
      begin = at;
    }
  }
  // The first of the greatest among `threads` neighbours, in the first of them.
  __device__ __forceinline__ void merge(int threads) {
    for (int delta = threads / 2; delta > 0; delta /= 2) {
      const T other = __shfl_down_sync(kWholeWarp, value, delta);
      const int at = __shfl_down_sync(kWholeWarp, begin, delta);
      const bool wins = other > value || (other == value && at < begin);
      value = wins ? other : value;
      begin = wins ? at : begin;
    }
  }
};

// Sums along both dimensions.
template <typename In, typename T>
__device__ __forceinline__ void sum_scores(const AlignItem<In>& item, const AlignScratch<T>& s,
                                           T penalty) {
  const int64_t width = item.lanes + 1;
  for (int64_t q = threadIdx.x; q < item.steps; q += blockDim.x) {
    T sum = 0;
    int16_t least = 0;
    s.lane_sums[(q + 1) * width] = 0;
    s.lane_least[(q + 1) * width] = 0;
    for (int64_t l = 0; l < item.lanes; ++l) {
      const T score = T(item.score(l, q));
      if (score == -kInfinity<T>) {
        least = int16_t(l + 1);
      } else {
        sum += score;
      }
      s.lane_sums[(q + 1) * width + l + 1] = sum;
      s.lane_least[(q + 1) * width + l + 1] = least;
    }
  }
  for (int64_t l = threadIdx.x; l < item.lanes; l += blockDim.x) {
    T sum = 0;
    int16_t least = 0;
    s.step_sums[l + 1] = 0;
    for (int64_t q = 1; q <= item.steps; ++q) {
      const T score = T(item.score(l, q - 1));
      if (score == -kInfinity<T>) {
        least = int16_t(q);
      } else {
        sum += score;
      }
      s.step_sums[q * width + l + 1] = sum;
      s.step_least[q * width + l + 1] = least;
    }
  }
  for (int64_t x = threadIdx.x; x < width; x += blockDim.x) {
    s.lane_costs[x] = length_cost(penalty, x, item.lanes);
    s.cells[x] = x == 0 ? T(0) : -kInfinity<T>;
  }
  for (int64_t x = threadIdx.x; x <= item.steps; x += blockDim.x)
    s.step_costs[x] = length_cost(penalty, x, item.steps);
}

// Cell (i, q), by `threads` neighbours of which this is number `rank`; written by the first.
// Indices of a square of at most 2^15 by 2^15 are ints.
template <typename In, typename T>
__device__ __forceinline__ void find_cell(const AlignItem<In>& item, const AlignScratch<T>& s,
                                          int i, int q, int rank, int threads) {
  const int width = int(item.lanes) + 1, at = q * width + i;
  const bool inside = i < width;
  Candidate<T> lanes = {-kInfinity<T>, 0}, steps = {-kInfinity<T>, 0};
  if (inside) {
    const T *before = s.cells + (at - i - width), *sums = s.lane_sums + (at - i);
    for (int k = s.lane_least[at] + rank; k < i; k += threads)
      lanes.offer((before[k] + divide(sums[i] - sums[k], i - k)) - s.lane_costs[i - k], k);
    const T sum = s.step_sums[at];
    for (int k = s.step_least[at] + rank; k < q; k += threads) {
      const T mean = divide(sum - s.step_sums[k * width + i], q - k);
      steps.offer((s.cells[k * width + i - 1] + mean) - s.step_costs[q - k], k);
    }
  }
  lanes.merge(threads);
  steps.merge(threads);
  if (!inside || rank != 0) return;
  const bool step = item.lanes_first ? steps.value > lanes.value : steps.value >= lanes.value;
  s.cells[at] = step ? steps.value : lanes.value;
  s.moves[at] = int16_t(step ? steps.begin - q : i - lanes.begin);
}

template <typename In, typename T>
__global__ void __launch_bounds__(kMaxThreads) monotonic_align_kernel(AlignParams<In, T> p) {
  TOKCORE_SHARED(int, wrong, 1);
  const Lattices<In>& in = p.out.in;
  T* reals = p.reals + blockIdx.x * p.reals_per_block;
  int16_t* shorts = p.shorts + blockIdx.x * p.shorts_per_block;
  for (int64_t number = blockIdx.x; number < in.batch; number += gridDim.x) {
    const bool fits = in.fits(number);
    const int64_t rows = fits ? in.rows_of(number) : 0, columns = fits ? in.columns_of(number) : 0;
    if (rows == 0 || columns == 0) {
      if (threadIdx.x == 0) fits ? p.out.put_empty(number) : p.out.put_wrong(number);
      continue;
    }
    const bool flat = p.out.rows_are_lanes(number);
    const AlignItem<In> item = {in.of(number),         flat ? in.columns : 1, flat ? 1 : in.columns,
                                flat ? rows : columns, flat ? columns : rows, flat};
    const AlignScratch<T> s(reals, shorts, item.lanes, item.steps);
    if (threadIdx.x == 0) wrong[0] = 0;
    // The mark is set, and the item before is written.
    __syncthreads();
    mark_unusable<T>(item.scores, in.columns, rows, columns, -kInfinity<In>, wrong);
    sum_scores(item, s, p.out.penalty);
    int threads = 1;
    while (threads < kWarpThreads && 2 * threads * item.lanes <= blockDim.x) threads *= 2;
    const int rank = int(threadIdx.x) % threads, cells = int(blockDim.x) / threads;
    for (int q = 1; q <= item.steps; ++q) {
      // The sums, and the cells of the step before, are written.
      __syncthreads();
      if (threadIdx.x == 0) s.cells[int64_t(q) * (item.lanes + 1)] = -kInfinity<T>;
      for (int first = 1; first <= item.lanes; first += cells)
        find_cell(item, s, first + int(threadIdx.x) / threads, q, rank, threads);
    }
    // The last cells are written, and the mark if something is wrong.
    __syncthreads();
    if (threadIdx.x != 0) continue;
    const T best = s.cells[item.steps * (item.lanes + 1) + item.lanes];
    if (wrong[0] != 0) {
      p.out.put_wrong(number);
      continue;
    }
    int64_t i = item.lanes, q = item.steps, count = 0;
    while (best > -kInfinity<T> && i > 0 && q > 0) {
      const int16_t move = s.moves[q * (item.lanes + 1) + i];
      s.path[count++] = move;
      i -= move > 0 ? move : 1;
      q -= move > 0 ? 1 : -move;
    }
    p.out.put(number, best, s.path, count);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> monotonic_align_cuda(
    const Tensor& scores, const std::optional<Tensor>& row_lengths,
    const std::optional<Tensor>& column_lengths, double length_penalty, bool wide) {
  const LatticeCall call =
      checked_align("monotonic_align", scores, row_lengths, column_lengths, wide);
  const DeviceGuard guard(device_index(scores));
  Tensor score = allocate_output(scores, {call.batch}, call.sum_type());
  Tensor groups = allocate_output(scores, {call.batch, call.steps(), 4}, ScalarType::Int);
  Tensor group_count = allocate_output(scores, {call.batch}, ScalarType::Int);
  Tensor row_ranges = allocate_output(scores, {call.batch, call.rows, 2}, ScalarType::Int);
  Tensor column_ranges = allocate_output(scores, {call.batch, call.columns, 2}, ScalarType::Int);
  const int64_t lanes = call.rows > call.columns ? call.rows : call.columns;
  const int64_t steps = call.rows + call.columns - lanes;
  call.dispatch([&](auto in, auto sum) {
    using In = decltype(in);
    using T = decltype(sum);
    const int64_t reals = AlignScratch<T>::reals(lanes, steps);
    const int64_t shorts = AlignScratch<T>::shorts(lanes, steps);
    const int64_t blocks = blocks_with_scratch(call.batch, reals * int64_t(sizeof(T)) + 2 * shorts);
    Tensor real_scratch = allocate_output(scores, {blocks * reals}, call.sum_type());
    Tensor short_scratch = allocate_output(scores, {blocks * shorts}, ScalarType::Short);
    launch(dim3(unsigned(blocks)), dim3(threads_for(4 * lanes)), 0, current_stream(scores),
           monotonic_align_kernel<In, T>,
           AlignParams<In, T>{{call.lattices<In>(), T(length_penalty), data_of<T>(score),
                               data_of<int32_t>(groups), data_of<int32_t>(group_count),
                               data_of<int32_t>(row_ranges), data_of<int32_t>(column_ranges)},
                              data_of<T>(real_scratch),
                              data_of<int16_t>(short_scratch),
                              reals,
                              shorts});
  });
  return {score, groups, group_count, row_ranges, column_ranges};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("monotonic_align", TORCH_BOX(&tokcore::monotonic_align_cuda));
}
