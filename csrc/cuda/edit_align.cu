// Edit alignments of a batch of pairs in one launch, a warp for each pair. A lane holds 32 rows of
// a column (common/edit_align.h) and is one column behind the lane above it, whose carry it needs;
// the rows at which a token stands come from one ballot for each lane. The warp that has filled the
// cells reads them back: loads of 32 columns at a time, of which a shuffle picks one each step.
#include <torch/csrc/stable/library.h>

#include "common/edit_align_call.h"
#include "common/namespace.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

using Word = uint32_t;
static_assert(kEditBits<Word> == kWarpThreads, "a ballot is a word of rows");

constexpr int kPairsOfBlock = 4;  // enough warps to hide each other's loads, few enough to spread

template <typename id_t>
struct EditLaunch {
  EditTensors<id_t> tensors;
  int64_t words;           // of the longest reference that there may be
  EditCells<Word>* cells;  // (pairs, H, words)
  int8_t* carries;         // (pairs, H), where a reference has more words than a warp has lanes
};

// One pair, as each of its 32 threads sees it.
template <typename id_t>
struct EditWarp {
  const EditLaunch<id_t>& p;
  int64_t pair;
  const id_t *hypothesis, *reference;
  int columns, rows, words, lane;

  __device__ __forceinline__ EditWarp(const EditLaunch<id_t>& launch, int64_t pair)
      : p(launch),
        pair(pair),
        hypothesis(p.tensors.hypothesis.of(pair)),
        reference(p.tensors.reference.of(pair)),
        columns(int(p.tensors.hypothesis.length(pair))),
        rows(int(p.tensors.reference.length(pair))),
        words(int(edit_words<Word>(rows))),
        lane(int(threadIdx.x) % kWarpThreads) {}

  __device__ __forceinline__ EditCells<Word>* cells_of_pair() const {
    return p.cells + pair * p.tensors.hypothesis.size * p.words;
  }

  __device__ __forceinline__ int64_t most_operations() const {
    return p.tensors.hypothesis.size + p.tensors.reference.size;
  }
  __device__ __forceinline__ int8_t* operations_of_pair() const {
    return p.tensors.outputs.operations + pair * most_operations();
  }
  __device__ __forceinline__ int8_t* tags_of_pair() const {
    return p.tensors.outputs.tags + pair * p.tensors.hypothesis.size;
  }
  __device__ __forceinline__ int32_t* gaps_of_pair() const {
    return p.tensors.outputs.gap_counts + pair * (p.tensors.hypothesis.size + 1);
  }

  template <typename T>
  __device__ __forceinline__ void fill(T* to, int64_t begin, int64_t end, int value) const {
    for (int64_t k = begin + lane; k < end; k += kWarpThreads) to[k] = T(value);
  }

  // The rows of this lane's word in which the token of column step - lane stands.
  __device__ __forceinline__ Word equal_rows(int first_word, int held, int step) const {
    Word mine = 0;
    // So that the loads of several ballots are under way together.
#pragma unroll 4
    for (int w = 0; w < held; ++w) {
      const int column = step - w;
      if (column < 0 || column >= columns) continue;  // for the whole warp
      const int row = (first_word + w) * kWarpThreads + lane;
      const bool same = row < rows && reference[row] == hypothesis[column];
      const Word equal = __ballot_sync(kWholeWarp, same);
      if (lane == w) mine = equal;
    }
    return mine;
  }

  __device__ __forceinline__ void fill_cells() const {
    EditCells<Word>* const cells = cells_of_pair();
    int8_t* const carries = p.carries + pair * p.tensors.hypothesis.size;
    for (int first = 0; first < words; first += kWarpThreads) {
      const int held = min(words - first, kWarpThreads);
      EditColumn<Word> column;
      int carry = 0;
      for (int step = 0; step < columns + held - 1; ++step) {
        const Word equal = equal_rows(first, held, step);
        const int above = __shfl_up_sync(kWholeWarp, carry, 1);
        const int j = step - lane;
        if (lane >= held || j < 0 || j >= columns) continue;
        carry = lane > 0 ? above : first == 0 ? 1 : carries[j];
        cells[int64_t(j) * words + first + lane] = edit_step(equal, column, carry);
        if (lane == kWarpThreads - 1 && first + held < words) carries[j] = int8_t(carry);
      }
      // Cells and carries are written, for other lanes to read.
      __syncwarp();
    }
  }

  // Operations from the end, written to the end of their row; how many there are is known after.
  __device__ __forceinline__ void trace() const {
    const EditOutputs& outputs = p.tensors.outputs;
    const EditCells<Word>* const cells = cells_of_pair();
    const int64_t most_columns = p.tensors.hypothesis.size, most = most_operations();
    int8_t* const operations = operations_of_pair();
    int8_t* const tags = tags_of_pair();
    int32_t* const gaps = gaps_of_pair();
    int64_t next = most;
    int i = rows, j = columns, missing = 0, distance = 0;
    int word = -1, newest = 0;  // in this lane: the cells of `word` in column newest - lane
    EditCells<Word> mine = {0, 0};
    while (i > 0 && j > 0) {
      if ((i - 1) / kWarpThreads != word || newest - (j - 1) >= kWarpThreads) {
        word = (i - 1) / kWarpThreads;
        newest = j - 1;
        if (newest >= lane) mine = cells[int64_t(newest - lane) * words + word];
      }
      const int source = newest - (j - 1);
      const EditCells<Word> cell = {__shfl_sync(kWholeWarp, mine.diagonal, source),
                                    __shfl_sync(kWholeWarp, mine.horizontal, source)};
      const int operation =
          cell.operation((i - 1) % kWarpThreads, reference[i - 1] == hypothesis[j - 1]);
      --next;
      distance += operation != kMatch;
      if (lane == 0) operations[next] = int8_t(operation);
      if (operation == kDeletion) {
        ++missing;
      } else {
        if (lane == 0) {
          tags[j - 1] = int8_t(operation);
          gaps[j] = missing;
        }
        missing = 0;
        --j;
      }
      i -= operation != kInsertion;
    }
    if (lane == 0) gaps[j] = missing + i;  // i > 0 only where j = 0
    fill(gaps, 0, j, 0);
    fill(tags, 0, j, kInsertion);
    fill(operations, next - i - j, next, i > 0 ? kDeletion : kInsertion);
    next -= i + j;
    // All operations are written.
    __syncwarp();
    const int64_t count = most - next;
    if (next > 0) move_operations(operations, next, count);
    if (lane == 0) {
      outputs.distance[pair] = distance + i + j;
      outputs.count[pair] = int32_t(count);
    }
    fill(operations, count, most, -1);
    fill(tags, columns, most_columns, -1);
    fill(gaps, columns + 1, most_columns + 1, -1);
  }

  // A length is out of range.
  __device__ __forceinline__ void refuse() const {
    fill(operations_of_pair(), 0, most_operations(), -1);
    fill(tags_of_pair(), 0, p.tensors.hypothesis.size, -1);
    fill(gaps_of_pair(), 0, p.tensors.hypothesis.size + 1, -1);
    if (lane == 0) p.tensors.outputs.distance[pair] = p.tensors.outputs.count[pair] = -1;
  }

  __device__ __forceinline__ void move_operations(int8_t* operations, int64_t from,
                                                  int64_t count) const {
    for (int64_t begin = 0; begin < count; begin += kWarpThreads) {
      const int64_t k = begin + lane;
      const int8_t operation = k < count ? operations[from + k] : int8_t(0);
      // Read by all lanes: what is written now may be among it.
      __syncwarp();
      if (k < count) operations[k] = operation;
    }
    // The last of them are read and written, and may be overwritten as padding.
    __syncwarp();
  }
};

// Registers for four blocks a processor: without a number the compiler aims higher and spills.
template <typename id_t>
__global__ void __launch_bounds__(kPairsOfBlock* kWarpThreads, 4)
    edit_align_kernel(EditLaunch<id_t> p) {
  const int64_t step = int64_t(gridDim.x) * kPairsOfBlock;
  for (int64_t pair = int64_t(blockIdx.x) * kPairsOfBlock + threadIdx.x / kWarpThreads;
       pair < p.tensors.pairs; pair += step) {
    const EditWarp<id_t> warp(p, pair);
    if (p.tensors.hypothesis.has_valid_length(pair) && p.tensors.reference.has_valid_length(pair)) {
      warp.fill_cells();
      warp.trace();
    } else {
      warp.refuse();
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edit_align_cuda(
    const Tensor& hypothesis, const Tensor& reference,
    const std::optional<Tensor>& hypothesis_lengths,
    const std::optional<Tensor>& reference_lengths) {
  const EditCall call = checked_edit_align("edit_align", hypothesis, reference, hypothesis_lengths,
                                           reference_lengths);
  const DeviceGuard guard(device_index(hypothesis));
  Tensor distance = allocate_output(hypothesis, call.pairs, ScalarType::Int);
  Tensor operations = allocate_output(hypothesis, call.operations_shape(), ScalarType::Char);
  Tensor count_ = allocate_output(hypothesis, call.pairs, ScalarType::Int);
  Tensor tags = allocate_output(hypothesis, call.tags_shape(), ScalarType::Char);
  Tensor gap_counts = allocate_output(hypothesis, call.gaps_shape(), ScalarType::Int);
  const int64_t pairs = count(call.pairs), columns = call.hypothesis_size();
  const int64_t words = edit_words<Word>(call.reference_size());
  const Shape cells_shape = {pairs, columns, words, 2};
  const Shape carries_shape = {words > kWarpThreads ? pairs * columns : 0};
  Tensor cells = allocate_output(hypothesis, cells_shape, ScalarType::Int);
  Tensor carries = allocate_output(hypothesis, carries_shape, ScalarType::Char);
  const auto run = [&](auto zero) {
    using id_t = decltype(zero);
    const EditLaunch<id_t> p = {call.tensors<id_t>(distance, operations, count_, tags, gap_counts),
                                words, static_cast<EditCells<Word>*>(cells.mutable_data_ptr()),
                                static_cast<int8_t*>(carries.mutable_data_ptr())};
    launch(dim3(block_count((pairs + kPairsOfBlock - 1) / kPairsOfBlock)),
           dim3(kPairsOfBlock * kWarpThreads), 0, current_stream(hypothesis),
           edit_align_kernel<id_t>, p);
  };
  call.hypothesis.scalar_type() == ScalarType::Int ? run(int32_t()) : run(int64_t());
  return {distance, operations, count_, tags, gap_counts};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("edit_align", TORCH_BOX(&tokcore::edit_align_cuda));
}
