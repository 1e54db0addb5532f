// The best monotone path through a matrix by one block: a thread has a row, a column behind that of
// the thread before it.
#pragma once

#include "common/lattice_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

// Blocks for a batch whose items need `bytes` of scratch each: as many as may hold a gigabyte.
inline int64_t blocks_with_scratch(int64_t batch, int64_t bytes) {
  constexpr int64_t kMostBytes = int64_t(1) << 30, kMost = 4096;
  const int64_t fitting = bytes > 0 ? kMostBytes / bytes : kMost;
  const int64_t blocks = batch < kMost ? batch : kMost;
  return blocks < fitting ? blocks : fitting > 1 ? fitting : 1;
}

inline int threads_for(int64_t rows) {
  int threads = kWarpThreads;
  while (threads < kMaxThreads && threads < rows) threads *= 2;
  return threads;
}

// What a kernel takes: Outputs is the operator's, with `in`, put and put_wrong.
template <typename Outputs, typename T>
struct LatticeParams {
  Outputs outputs;
  T* above;        // (blocks, columns)
  uint8_t* moves;  // (blocks, move_count)
};

// The sum is in `total` and what was wrong in `wrong` when all threads are through.
template <typename Rule, typename In, typename T>
__device__ __forceinline__ void sweep_lattice(const In* values, int64_t stride, int64_t rows,
                                              int64_t columns, T* above, uint8_t* moves,
                                              Shared<T> total, Shared<int> wrong) {
  TOKCORE_SHARED(T, edge, 2 * kMaxThreads);
  constexpr T kWorst = Rule::template kWorst<T>;
  const double largest = largest_value<T>(rows, columns);
  const int64_t strip = blockDim.x, lane = threadIdx.x;
  bool usable = true;
  for (int64_t first = 0; first < rows; first += strip) {
    const int64_t row = first + lane;
    T left = kWorst, diagonal = row == 0 ? T(0) : kWorst;
    for (int64_t s = 0; s < columns + strip - 1; ++s) {
      // What the step before wrote is there; what the one before it wrote has been read.
      __syncthreads();
      const int64_t column = s - lane;
      if (row >= rows || column < 0 || column >= columns) continue;
      T up = kWorst;
      if (lane > 0) {
        up = edge[(s + 1) % 2 * strip + lane - 1];
      } else if (first > 0) {
        up = above[column];
      }
      const T value = T(values[row * stride + column]);
      usable = usable && is_usable(value, kWorst, largest);
      uint8_t move;
      left = Rule::template cell<T>(value, diagonal, up, left, move);
      diagonal = up;
      moves[move_index(row, column, columns, strip)] = move;
      edge[s % 2 * strip + lane] = left;
      if (lane == strip - 1) above[column] = left;
    }
    if (row == rows - 1) total[0] = left;
  }
  if (!usable) atomicOr(&wrong[0], 1);
}

// feasible(rows, columns): whether an item of this size has a path at all.
template <typename Rule, typename Outputs, typename T, typename Feasible>
__device__ __forceinline__ void run_lattices(const LatticeParams<Outputs, T>& p,
                                             const Feasible& feasible) {
  TOKCORE_SHARED(T, total, 1);
  TOKCORE_SHARED(int, wrong, 1);
  const auto& in = p.outputs.in;
  const int64_t strip = blockDim.x;
  uint8_t* moves = p.moves + blockIdx.x * move_count(in.rows, in.columns, strip);
  for (int64_t item = blockIdx.x; item < in.batch; item += gridDim.x) {
    const bool fits = in.fits(item);
    const int64_t rows = fits ? in.rows_of(item) : 0, columns = fits ? in.columns_of(item) : 0;
    // The item before is written.
    __syncthreads();
    if (threadIdx.x == 0) {
      wrong[0] = fits && feasible(rows, columns) ? 0 : 1;
      total[0] = rows == columns ? T(0) : Rule::template kWorst<T>;
    }
    // The marks are set.
    __syncthreads();
    if (rows > 0 && columns > 0) {
      sweep_lattice<Rule>(in.of(item), in.columns, rows, columns, p.above + blockIdx.x * in.columns,
                          moves, total, wrong);
    }
    // The sum and the moves are written.
    __syncthreads();
    if (threadIdx.x != 0) continue;
    if (wrong[0] != 0) {
      p.outputs.put_wrong(item);
    } else {
      p.outputs.put(item, T(total[0]), moves, strip);
    }
  }
}

// launches kernel over the items of the call.
template <typename Outputs, typename T>
void launch_lattices(const LatticeCall& call, const Outputs& outputs,
                     void (*kernel)(LatticeParams<Outputs, T>)) {
  const int threads = threads_for(call.rows);
  const int64_t moves = move_count(call.rows, call.columns, threads);
  const int64_t above = call.columns * int64_t(sizeof(T));
  const int64_t blocks = blocks_with_scratch(call.batch, moves + above);
  Tensor above_scratch = allocate_output(call.values, {blocks * above}, ScalarType::Byte);
  Tensor moves_scratch = allocate_output(call.values, {blocks * moves}, ScalarType::Byte);
  launch(dim3(unsigned(blocks)), dim3(threads), 0, current_stream(call.values), kernel,
         LatticeParams<Outputs, T>{outputs, static_cast<T*>(above_scratch.mutable_data_ptr()),
                                   data_of<uint8_t>(moves_scratch)});
}

}  // namespace
}  // namespace tokcore
