// Edit alignments of one reference with many orders of one hypothesis, which is what a search for
// shifts asks for. Columns that an order shares with the one aligned last are not computed again.
//
// The beam of tercom is costly to follow and hardly ever matters: an alignment of at most `beam`
// edits passes only through cells of at most as many, none of which the beam can drop (nor can it,
// where no cell costs more). All others are aligned a second time, as tercom does.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common/edit_align.h"
#include "host/ter.h"

namespace tokcore {
namespace {

class WordAligner {
 public:
  explicit WordAligner(int64_t beam) : beam_(beam) {}

  void set(Words hypothesis, Words reference) {
    known_.assign(reference.ids, reference.ids + reference.size);
    std::sort(known_.begin(), known_.end());
    known_.erase(std::unique(known_.begin(), known_.end()), known_.end());
    const auto number_all = [&](Words sentence, std::vector<int32_t>& numbers) {
      numbers.resize(sentence.size);
      for (int64_t i = 0; i < sentence.size; ++i) numbers[i] = number(sentence.ids[i]);
    };
    number_all(hypothesis, hypothesis_);
    number_all(reference, reference_);
    words_ = edit_words<Word>(rows());
    rows_of_.assign((known_.size() + 1) * words_, 0);
    for (int64_t i = 0; i < rows(); ++i)
      rows_of_[reference_[i] * words_ + i / kBits] |= Word(1) << i % kBits;
  }

  // Numbers that stand for the words: 0 is for all words that the reference has not.
  const std::vector<int32_t>& hypothesis() const { return hypothesis_; }
  const std::vector<int32_t>& reference() const { return reference_; }
  int64_t numbers() const { return int64_t(known_.size()) + 1; }

  int64_t align(const std::vector<int32_t>& order, std::vector<int8_t>& operations) {
    const int64_t distance = fill(order);
    if (beam_matters(distance)) return align_beamed(order, &operations);
    trace(order, operations);
    return distance;
  }

  // Of an order that is the one aligned last up to column `from`; more than `most` where it is
  // more, but not how much more.
  int64_t distance(const std::vector<int32_t>& order, int64_t from, int64_t most) {
    const int64_t distance = words_ == 1 ? walk_word(order, from, most) : walk(order, from, most);
    return distance <= most && beam_matters(distance) ? align_beamed(order, nullptr) : distance;
  }

 private:
  using Word = uint64_t;
  static constexpr int kBits = kEditBits<Word>;

  int64_t rows() const { return int64_t(reference_.size()); }
  int64_t columns() const { return int64_t(hypothesis_.size()); }
  int last_bit() const { return int((rows() - 1) % kBits); }
  bool beam_matters(int64_t distance) const {
    return beam_ >= 0 && distance > beam_ && std::max(rows(), columns()) > beam_;
  }

  int32_t number(int64_t id) const {
    const auto at = std::lower_bound(known_.begin(), known_.end(), id);
    return at != known_.end() && *at == id ? int32_t(at - known_.begin()) + 1 : 0;
  }

  int64_t fill(const std::vector<int32_t>& order) {
    states_.resize((columns() + 1) * words_);
    cells_.resize(columns() * words_);
    costs_.resize(columns() + 1);
    std::fill_n(states_.begin(), words_, EditColumn<Word>());
    costs_[0] = rows();
    for (int64_t j = 0; j < columns(); ++j) {
      const Word* equal = rows_of_.data() + order[j] * words_;
      int carry = 1;
      for (int64_t w = 0; w < words_; ++w) {
        EditColumn<Word> state = states_[j * words_ + w];
        cells_[j * words_ + w] =
            edit_step(equal[w], state, carry, w + 1 < words_ ? kBits - 1 : last_bit());
        states_[(j + 1) * words_ + w] = state;
      }
      costs_[j + 1] = costs_[j] + carry;
    }
    return costs_[columns()];
  }

  void trace(const std::vector<int32_t>& order, std::vector<int8_t>& operations) const {
    operations.clear();
    int64_t i = rows(), j = columns();
    while (i > 0 || j > 0) {
      int operation = i > 0 ? kDeletion : kInsertion;
      if (i > 0 && j > 0)
        operation = cells_[(j - 1) * words_ + (i - 1) / kBits].operation(
            int((i - 1) % kBits), reference_[i - 1] == order[j - 1]);
      operations.push_back(int8_t(operation));
      i -= operation != kInsertion;
      j -= operation != kDeletion;
    }
    std::reverse(operations.begin(), operations.end());
  }

  // One word of rows, which stays in registers. No column that is left can save more than one edit.
  int64_t walk_word(const std::vector<int32_t>& order, int64_t from, int64_t most) const {
    EditColumn<Word> state = states_[from];
    const int last = last_bit();
    int64_t cost = costs_[from], left = columns() - from;
    for (int64_t j = from; cost - left <= most && left > 0; ++j, --left) {
      int carry = 1;
      edit_step(rows_of_[order[j]], state, carry, last);
      cost += carry;
    }
    return cost - left <= most ? cost : most + 1;
  }

  int64_t walk(const std::vector<int32_t>& order, int64_t from, int64_t most) {
    walked_.assign(states_.begin() + from * words_, states_.begin() + (from + 1) * words_);
    int64_t cost = costs_[from], left = columns() - from;
    for (int64_t j = from; cost - left <= most && left > 0; ++j, --left) {
      const Word* equal = rows_of_.data() + order[j] * words_;
      int carry = 1;
      for (int64_t w = 0; w < words_; ++w)
        edit_step(equal[w], walked_[w], carry, w + 1 < words_ ? kBits - 1 : last_bit());
      cost += carry;
    }
    return cost - left <= most ? cost : most + 1;
  }

  // Cell by cell, forwards: a cell that is not dropped offers its cost to the three after it, which
  // take what is strictly less, diagonally first. Rows begin at the first that was not dropped in
  // the column before and end where nothing is offered any more.
  int64_t align_beamed(const std::vector<int32_t>& order, std::vector<int8_t>* operations) {
    constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 2;
    const int64_t size = rows() + 1;
    std::vector<int64_t> now(size, kNever), next(size, kNever);
    std::vector<int8_t> from(operations != nullptr ? size * (columns() + 1) : 0);
    now[0] = 0;
    int64_t first = 0, last = 0;
    // The least cost of a diagonal step into a column: of every match, and of a substitution that
    // was taken.
    int64_t best = kNever, next_best;
    for (int64_t j = 0; j <= columns(); ++j) {
      int64_t first_kept = -1, last_kept = -1;
      next_best = kNever;
      const auto offer = [&](std::vector<int64_t>& costs, int64_t i, int64_t to_column,
                             int64_t cost, int operation) {
        if (cost >= costs[i]) return false;
        costs[i] = cost;
        if (operations != nullptr) from[to_column * size + i] = int8_t(operation);
        return true;
      };
      for (int64_t i = first; i < size && i <= last; ++i) {
        const int64_t cost = now[i];
        if (cost == kNever || (j < columns() && cost > best + beam_)) continue;
        if (first_kept < 0) first_kept = i;
        last_kept = i;
        if (j < columns()) {
          if (i + 1 < size) {
            const bool same = reference_[i] == order[j];
            const int64_t aligned = cost + (same ? 0 : 1);
            const bool taken = offer(next, i + 1, j + 1, aligned, same ? kMatch : kSubstitution);
            if (same || taken) next_best = std::min(next_best, aligned);
          }
          offer(next, i, j + 1, cost + 1, kInsertion);
        }
        if (i + 1 < size && offer(now, i + 1, j, cost + 1, kDeletion)) last = std::max(last, i + 1);
      }
      if (j == columns()) break;
      first = first_kept;
      last = last_kept + 1;
      best = next_best;
      std::swap(now, next);
      std::fill(next.begin(), next.end(), kNever);
    }
    if (operations != nullptr) {
      operations->clear();
      for (int64_t i = rows(), j = columns(); i > 0 || j > 0;) {
        const int operation = from[j * size + i];
        operations->push_back(int8_t(operation));
        i -= operation != kInsertion;
        j -= operation != kDeletion;
      }
      std::reverse(operations->begin(), operations->end());
    }
    return now[rows()];
  }

  int64_t beam_, words_ = 0;
  std::vector<int64_t> known_;  // the ids of the reference, rising
  std::vector<int32_t> hypothesis_, reference_;
  std::vector<Word> rows_of_;             // (numbers, words_): where each number stands
  std::vector<EditColumn<Word>> states_;  // (columns + 1, words_) of the order aligned last
  std::vector<EditCells<Word>> cells_;    // (columns, words_)
  std::vector<int64_t> costs_;            // (columns + 1,): S[rows][j]
  std::vector<EditColumn<Word>> walked_;
};

}  // namespace
}  // namespace tokcore
