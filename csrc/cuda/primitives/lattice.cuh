// The best monotone path through a matrix by one block: a thread has a row, a column behind that of
// the thread before it.
#pragma once

#include <algorithm>

#include "common/lattice_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

// Blocks for a batch whose items need `bytes` of scratch each: as many as may hold a gigabyte.
inline int64_t blocks_with_scratch(int64_t batch, int64_t bytes) {
  constexpr int64_t kMostBytes = int64_t(1) << 30, kMost = 4096;
  const int64_t fitting = kMostBytes / std::max<int64_t>(bytes, 1);
  return std::min({batch, kMost, std::max<int64_t>(fitting, 1)});
}

inline int threads_for(int64_t rows) {
  int threads = kWarpThreads;
  while (threads < kMaxThreads && threads < rows) threads *= 2;
  return threads;
}

// Sets `wrong` unless all values are usable, also those that no path can visit: what the CPU
// refuses. A warp has a row at a time.
template <typename T, typename In>
__device__ __forceinline__ void mark_unusable(const In* values, int64_t stride, int64_t rows,
                                              int64_t columns, In forbidden, Shared<int> wrong) {
  const In largest = largest_value<T, In>(rows, columns);
  bool usable = true;
  for (int64_t row = threadIdx.x / kWarpThreads; row < rows; row += blockDim.x / kWarpThreads) {
    for (int64_t i = threadIdx.x % kWarpThreads; i < columns; i += kWarpThreads)
      usable = usable && is_usable(values[row * stride + i], forbidden, largest);
  }
  if (!usable) atomicOr(&wrong[0], 1);
}

// What a kernel takes: Outputs is the operator's, with `in`, put and put_wrong.
template <typename Outputs, typename T>
struct LatticeParams {
  Outputs outputs;
  T* above;        // (blocks, columns)
  uint8_t* moves;  // (blocks, moves_per_block)
  int64_t moves_per_block;
};

// `columns` of each row, which begin `stride` values behind those of the row before. The sum is in
// `total` when all threads are through.
template <typename Rule, typename In, typename T>
__device__ __forceinline__ void sweep_lattice(const In* values, int64_t stride, int64_t rows,
                                              int64_t columns, int64_t strip, T* above,
                                              uint8_t* moves, Shared<T> total) {
  TOKCORE_SHARED(T, edge, 2 * kMaxThreads);
  constexpr T kWorst = Rule::template kWorst<T>;
  const int64_t lane = threadIdx.x, steps = columns + strip - 1;
  for (int64_t first = 0; first < rows; first += strip, moves += steps * strip) {
    const int64_t row = first + lane;
    T left = row == 0 ? T(0) : kWorst, diagonal = kWorst;
    for (int64_t s = 0; s < steps; ++s) {
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
      uint8_t move;
      left = Rule::template cell<T>(value, diagonal, up, left, move);
      diagonal = up;
      moves[s * strip + lane] = move;  // move_index without its divisions
      edge[s % 2 * strip + lane] = left;
      if (lane == strip - 1) above[column] = left;
    }
    if (row == rows - 1) total[0] = left;
  }
}

template <typename Rule, template <typename, typename> class Outputs, typename In, typename T>
__device__ __forceinline__ void run_lattices(const LatticeParams<Outputs<In, T>, T>& p) {
  TOKCORE_SHARED(T, total, 1);
  TOKCORE_SHARED(int, wrong, 1);
  const Lattices<In>& in = p.outputs.in;
  T* above = p.above + blockIdx.x * in.columns;
  uint8_t* moves = p.moves + blockIdx.x * p.moves_per_block;
  for (int64_t item = blockIdx.x; item < in.batch; item += gridDim.x) {
    const bool fits = in.fits(item) && Rule::kShift * in.rows_of(item) <= in.columns_of(item);
    const int64_t rows = fits ? in.rows_of(item) : 0, columns = fits ? in.columns_of(item) : 0;
    const int64_t width = band_width<Rule>(rows, columns), strip = min(rows, int64_t(blockDim.x));
    if (threadIdx.x == 0) {
      wrong[0] = fits ? 0 : 1;
      total[0] = rows + columns == 0 ? T(0) : Rule::template kWorst<T>;
    }
    // The marks are set, and the item before is written.
    __syncthreads();
    const In* values = in.of(item);
    mark_unusable<T>(values, in.columns, rows, columns, Rule::template kWorst<In>, wrong);
    if (width > 0) {
      sweep_lattice<Rule>(values, in.columns + Rule::kShift, rows, width, strip, above, moves,
                          total);
    }
    // The sum, the moves and what was wrong are written.
    __syncthreads();
    if (threadIdx.x != 0) continue;
    if (wrong[0] != 0) {
      p.outputs.put_wrong(item);
    } else {
      p.outputs.put(item, T(total[0]), moves, strip);
    }
  }
}

// Moves of the largest item that there may be: where rows take columns (kShift) it is not always
// the tallest.
template <typename Rule>
int64_t most_moves(const LatticeCall& call, int64_t threads) {
  int64_t most = 0;
  const int64_t least = call.row_lengths ? 1 : call.rows;
  for (int64_t rows = std::max<int64_t>(least, 1); rows <= call.rows; ++rows) {
    const int64_t width = band_width<Rule>(rows, call.columns);
    most = std::max(most, move_count(rows, width, std::min(rows, threads)));
  }
  return most;
}

// launches kernel over the items of the call.
template <typename Rule, typename Outputs, typename T>
void launch_lattices(const LatticeCall& call, const Outputs& outputs,
                     void (*kernel)(LatticeParams<Outputs, T>)) {
  const int threads = threads_for(call.rows);
  const int64_t moves = most_moves<Rule>(call, threads);
  const int64_t above = call.columns * int64_t(sizeof(T));
  const int64_t blocks = blocks_with_scratch(call.batch, moves + above);
  Tensor above_scratch = allocate_output(call.values, {blocks * above}, ScalarType::Byte);
  Tensor moves_scratch = allocate_output(call.values, {blocks * moves}, ScalarType::Byte);
  launch(dim3(unsigned(blocks)), dim3(threads), 0, current_stream(call.values), kernel,
         LatticeParams<Outputs, T>{outputs, static_cast<T*>(above_scratch.mutable_data_ptr()),
                                   data_of<uint8_t>(moves_scratch), moves});
}

}  // namespace
}  // namespace tokcore
