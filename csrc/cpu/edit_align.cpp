// Edit alignments of a batch of pairs, the pairs in parallel. The arithmetic is
// common/edit_align.h, 64 cells an instruction in ordinary registers; nothing here is worth an
// instruction set of its own, so the rows of the levels are empty.
#if !defined(TOKCORE_ISA)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/edit_align_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;
using Word = uint64_t;
constexpr int kBits = kEditBits<Word>;

// What the longest pair needs, so that nothing is allocated where pairs run in parallel.
struct EditSizes {
  int64_t rows = 0, words = 0, cells = 0;
};

// The rows at which each token of a reference stands, as words of bits.
template <typename id_t>
class TokenRows {
 public:
  explicit TokenRows(const EditSizes& most)
      : table_(table_size(most.rows)), rows_((most.rows + 1) * most.words) {}

  void set(const id_t* reference, int64_t length) {
    words_ = edit_words<Word>(length);
    const int64_t size = table_size(length);
    shift_ = 64 - __builtin_ctzll(size);
    last_ = size - 1;
    std::fill_n(table_.begin(), size, Entry{0, 0});
    std::fill_n(rows_.begin(), words_, 0);  // number 0: tokens that do not occur
    int64_t distinct = 0;
    for (int64_t i = 0; i < length; ++i) {
      Entry& entry = find(reference[i]);
      if (entry.number == 0) {
        entry = {reference[i], ++distinct};
        std::fill_n(rows_.begin() + distinct * words_, words_, 0);
      }
      rows_[entry.number * words_ + i / kBits] |= Word(1) << i % kBits;
    }
  }

  const Word* of(id_t token) { return rows_.data() + find(token).number * words_; }

 private:
  struct Entry {
    id_t token;
    int64_t number;  // 0: the entry is free
  };

  // At most half full, so that a search ends soon.
  static int64_t table_size(int64_t tokens) {
    int64_t size = 2;
    while (size < 2 * tokens) size *= 2;
    return size;
  }

  Entry& find(id_t token) {
    // Multiplied by 2^64 over the golden ratio: the upper bits mix those of the token.
    uint64_t at = uint64_t(token) * 0x9e3779b97f4a7c15u >> shift_;
    while (table_[at].number != 0 && table_[at].token != token) at = (at + 1) & last_;
    return table_[at];
  }

  std::vector<Entry> table_;
  std::vector<Word> rows_;
  int64_t words_ = 0, last_ = 0;
  int shift_ = 0;
};

template <typename id_t>
class Aligner {
 public:
  explicit Aligner(const EditSizes& most)
      : token_rows_(most), columns_(most.words), cells_(most.cells) {}

  void align(const EditTensors<id_t>& p, int64_t pair) {
    hypothesis_ = p.hypothesis.of(pair);
    reference_ = p.reference.of(pair);
    const int64_t columns = p.hypothesis.length(pair), rows = p.reference.length(pair);
    fill_cells(columns, rows);
    trace(p, pair, columns, rows);
  }

 private:
  void fill_cells(int64_t columns, int64_t rows) {
    const int64_t words = edit_words<Word>(rows);
    if (words == 0) return;
    token_rows_.set(reference_, rows);
    if (words == 1) {  // stays in registers
      EditColumn<Word> column;
      for (int64_t j = 0; j < columns; ++j) {
        int carry = 1;
        cells_[j] = edit_step(*token_rows_.of(hypothesis_[j]), column, carry);
      }
      return;
    }
    std::fill_n(columns_.begin(), words, EditColumn<Word>());
    for (int64_t j = 0; j < columns; ++j) {
      const Word* equal = token_rows_.of(hypothesis_[j]);
      EditCells<Word>* cells = cells_.data() + j * words;
      int carry = 1;  // S[0][j] = j
      for (int64_t w = 0; w < words; ++w) cells[w] = edit_step(equal[w], columns_[w], carry);
    }
  }

  // From the end, so operations are written from the end of their row and moved to its start.
  void trace(const EditTensors<id_t>& p, int64_t pair, int64_t columns, int64_t rows) const {
    const int64_t words = edit_words<Word>(rows), most = p.hypothesis.size + p.reference.size;
    int8_t* const begin = p.outputs.operations + pair * most;
    int8_t* const tags = p.outputs.tags + pair * p.hypothesis.size;
    int32_t* const gaps = p.outputs.gap_counts + pair * (p.hypothesis.size + 1);
    std::fill_n(gaps, columns + 1, 0);
    std::fill(gaps + columns + 1, gaps + p.hypothesis.size + 1, -1);
    int8_t* next = begin + most;
    int64_t i = rows, j = columns;
    int32_t distance = int32_t(rows + columns);
    while (i > 0 && j > 0) {
      const EditCells<Word>& cells = cells_[(j - 1) * words + (i - 1) / kBits];
      const int operation =
          cells.operation(int((i - 1) % kBits), reference_[i - 1] == hypothesis_[j - 1]);
      *--next = int8_t(operation);
      tags[j - 1] = int8_t(operation);  // of a deletion: until the token's own operation comes
      gaps[j] += operation == kDeletion;
      i -= operation != kInsertion;
      j -= operation != kDeletion;
      distance -= operation == kMatch ? 2 : operation == kSubstitution;
    }
    std::fill_n(tags, j, int8_t(kInsertion));
    std::fill(tags + columns, tags + p.hypothesis.size, int8_t(-1));
    gaps[0] += int32_t(i);
    next -= i + j;
    std::fill_n(next, i + j, int8_t(i > 0 ? kDeletion : kInsertion));
    const int64_t count = begin + most - next;
    if (next != begin) std::copy(next, begin + most, begin);
    std::fill(begin + count, begin + most, int8_t(-1));
    p.outputs.count[pair] = int32_t(count);
    p.outputs.distance[pair] = distance;
  }

  TokenRows<id_t> token_rows_;
  std::vector<EditColumn<Word>> columns_;
  std::vector<EditCells<Word>> cells_;
  const id_t *hypothesis_ = nullptr, *reference_ = nullptr;
};

void check_lengths(const char* op, const char* name, const std::optional<Tensor>& lengths,
                   int64_t size) {
  if (!lengths) return;
  const int64_t* values = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (int64_t pair = 0; pair < lengths->numel(); ++pair)
    check(values[pair] >= 0 && values[pair] <= size, op, name, " must lie in [0, ", size, "], got ",
          values[pair], " for pair ", pair);
}

template <typename id_t>
void align_all(const EditTensors<id_t>& p) {
  EditSizes most;
  int64_t cells = 0;
  for (int64_t pair = 0; pair < p.pairs; ++pair) {
    const int64_t rows = p.reference.length(pair), words = edit_words<Word>(rows);
    most.rows = std::max(most.rows, rows);
    most.words = std::max(most.words, words);
    most.cells = std::max(most.cells, p.hypothesis.length(pair) * words);
    cells += p.hypothesis.length(pair) * words;
  }
  constexpr int64_t kWorthAThread = 1024;  // words of cells, some 20 microseconds
  const int64_t ranges =
      std::min({p.pairs, int64_t(torch::stable::get_num_threads()), 1 + cells / kWorthAThread});
  if (ranges == 0) return;
  std::vector<Aligner<id_t>> aligners;
  aligners.reserve(ranges);
  for (int64_t range = 0; range < ranges; ++range) aligners.emplace_back(most);
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) {
      const int64_t last = p.pairs * (range + 1) / ranges;
      for (int64_t pair = p.pairs * range / ranges; pair < last; ++pair)
        aligners[range].align(p, pair);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edit_align_cpu(
    const Tensor& hypothesis, const Tensor& reference,
    const std::optional<Tensor>& hypothesis_lengths,
    const std::optional<Tensor>& reference_lengths) {
  const char* op = "edit_align";
  const EditCall call =
      checked_edit_align(op, hypothesis, reference, hypothesis_lengths, reference_lengths);
  check_lengths(op, "hypothesis_lengths", call.hypothesis_lengths, call.hypothesis_size());
  check_lengths(op, "reference_lengths", call.reference_lengths, call.reference_size());
  Tensor distance = new_empty(hypothesis, call.pairs, ScalarType::Int);
  Tensor operations = new_empty(hypothesis, call.operations_shape(), ScalarType::Char);
  Tensor count = new_empty(hypothesis, call.pairs, ScalarType::Int);
  Tensor tags = new_empty(hypothesis, call.tags_shape(), ScalarType::Char);
  Tensor gap_counts = new_empty(hypothesis, call.gaps_shape(), ScalarType::Int);
  const auto run = [&](auto zero) {
    align_all(call.tensors<decltype(zero)>(distance, operations, count, tags, gap_counts));
  };
  call.hypothesis.scalar_type() == ScalarType::Int ? run(int32_t()) : run(int64_t());
  return {distance, operations, count, tags, gap_counts};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("edit_align", TORCH_BOX(&tokcore::edit_align_cpu));
}

#endif
