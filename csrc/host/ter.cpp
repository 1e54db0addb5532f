// The greedy search for shifts, and pairs in parallel.
#include "host/ter.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <future>
#include <numeric>

#include "host/word_aligner.h"

namespace tokcore {
namespace {

constexpr int64_t kMostWords = 10;  // of a shift
constexpr int64_t kWordsBetweenPolls = 4096;
constexpr std::chrono::milliseconds kBetweenPolls{100};  // of one who waits
constexpr int64_t kCellsOfThread = 1 << 14;  // fewer are aligned before another thread has begun

// A shift swaps two neighbouring ranges: [first, middle) and [middle, last).
struct Swap {
  int64_t first, middle, last;
};

Swap swap_of(const TerShift& shift, int64_t words) {
  if (shift.target < shift.start) return {shift.target + 1, shift.start, shift.end + 1};
  if (shift.target > shift.end) return {shift.start, shift.end + 1, shift.target + 1};
  // A target within: as many of the words that follow go first as the target is after the start.
  const int64_t following = shift.target - shift.start;
  return {shift.start, shift.end + 1, std::min(shift.end + 1 + following, words)};
}

template <typename T>
void apply(const Swap& swap, std::vector<T>& order) {
  const auto at = order.begin();
  std::rotate(at + swap.first, at + swap.middle, at + swap.last);
}

class Scorer {
 public:
  Scorer(const TerOptions& options, std::function<void()> poll)
      : options_(options), poll_(std::move(poll)), aligner_(options.beam) {}

  TerResult score(Words hypothesis, Words reference) {
    poll_();
    aligner_.set(hypothesis, reference);
    list_positions();
    current_ = aligner_.hypothesis();
    TerResult result;
    result.order.resize(current_.size());
    std::iota(result.order.begin(), result.order.end(), 0);
    int64_t edits = aligner_.align(current_, result.operations);
    TerShift shift;
    while (options_.max_shift_distance > 0 && find_shift(result.operations, edits, shift)) {
      const Swap swap = swap_of(shift, words());
      apply(swap, current_);
      apply(swap, result.order);
      result.shifts.push_back(shift);
      edits = aligner_.align(current_, result.operations);
    }
    result.edits = edits + int64_t(result.shifts.size());
    return result;
  }

 private:
  void step() {
    walked_ += words();
    if (walked_ < kWordsBetweenPolls) return;
    walked_ = 0;
    poll_();
  }

  int64_t words() const { return int64_t(current_.size()); }

  // Where each number stands in the reference, rising.
  void list_positions() {
    const std::vector<int32_t>& reference = aligner_.reference();
    first_position_.assign(aligner_.numbers() + 1, 0);
    for (const int32_t number : reference) ++first_position_[number + 1];
    std::partial_sum(first_position_.begin(), first_position_.end(), first_position_.begin());
    std::vector<int64_t> next(first_position_.begin(), first_position_.end());
    positions_.resize(reference.size());
    for (size_t i = 0; i < reference.size(); ++i) positions_[next[reference[i]]++] = int64_t(i);
  }

  // What an alignment makes of every word. A missing word of the reference belongs to the word of
  // the hypothesis before it, -1 at the front.
  void place(const std::vector<int8_t>& operations) {
    wrong_.clear();
    partner_.clear();
    wrong_before_.assign(1, 0);
    for (const int8_t operation : operations) {
      const bool wrong = operation != kMatch;
      if (operation != kDeletion) wrong_.push_back(wrong);
      if (operation == kInsertion) continue;
      partner_.push_back(int64_t(wrong_.size()) - 1);
      wrong_before_.push_back(wrong_before_.back() + wrong);
    }
  }

  // The best shift, longer ones first, if one saves at least an edit.
  bool find_shift(const std::vector<int8_t>& operations, int64_t edits, TerShift& best) {
    place(operations);
    list_candidates();
    moved_ = current_;
    int64_t best_edits = edits;
    bool chosen = false;
    for (int64_t length = kMostWords; length > 0; --length) {
      // With what is saved already, shifts of this length cannot do better any more.
      const auto hopeless = [&] {
        const int64_t saved = edits - best_edits - (chosen ? 1 : 0);
        return saved > 2 * length || (chosen && saved == 2 * length);
      };
      if (hopeless()) break;
      for (const TerShift& shift : candidates_[length - 1]) {
        if (hopeless()) break;
        step();
        const Swap swap = swap_of(shift, words());
        const auto at = current_.begin();
        std::rotate_copy(at + swap.first, at + swap.middle, at + swap.last,
                         moved_.begin() + swap.first);
        // One edit less than the best makes up for the shift if it is the first, and beats another.
        const int64_t found = aligner_.distance(moved_, swap.first, best_edits - 1);
        std::copy(at + swap.first, at + swap.last, moved_.begin() + swap.first);
        if (found >= best_edits) continue;
        best_edits = found;
        best = shift;
        chosen = true;
      }
    }
    return chosen;
  }

  void list_candidates() {
    for (std::vector<TerShift>& of_length : candidates_) of_length.clear();
    for (int64_t start = 0; start < words(); ++start) {
      step();
      const int64_t number = current_[start];
      found_.assign(positions_.begin() + first_position_[number],
                    positions_.begin() + first_position_[number + 1]);
      const bool near = std::any_of(found_.begin(), found_.end(), [&](int64_t m) {
        return partner_[m] != start && partner_[m] - start <= options_.max_shift_distance &&
               start - partner_[m] - 1 <= options_.max_shift_distance;
      });
      if (near) list_candidates_at(start);
    }
  }

  // Blocks that start there and stand in the reference, where found_ says.
  void list_candidates_at(int64_t start) {
    const std::vector<int32_t>& reference = aligner_.reference();
    bool wrong = false;
    for (int64_t end = start; end < words() && end - start < kMostWords; ++end) {
      const int64_t offset = end - start;
      const auto differs = [&](int64_t m) {
        return m + offset >= int64_t(reference.size()) || reference[m + offset] != current_[end];
      };
      found_.erase(std::remove_if(found_.begin(), found_.end(), differs), found_.end());
      wrong |= wrong_[end];
      if (found_.empty() || (wrong && !list_targets(start, end))) return;
    }
  }

  // Whether a longer block may have targets too. A target that two positions share is listed once:
  // the second could not be better than the first.
  bool list_targets(int64_t start, int64_t end) {
    const int64_t length = end - start + 1;
    bool reachable = false;
    targets_.clear();
    for (const int64_t m : found_) {
      const int64_t partner = partner_[m];
      if ((partner >= start && partner <= end) ||
          std::abs(partner - start) > options_.max_shift_distance)
        continue;
      reachable = true;
      if (wrong_before_[m + length] == wrong_before_[m]) continue;
      for (int64_t offset = -1; offset < length; ++offset) {
        int64_t target = -1;
        if (offset >= 0 || m > 0) {
          target = partner_[m + offset];
          if (target == start || (offset != 0 && target == partner)) continue;
        }
        if (std::find(targets_.begin(), targets_.end(), target) != targets_.end()) continue;
        targets_.push_back(target);
        candidates_[length - 1].push_back({start, end, m + offset, target});
      }
    }
    return reachable;
  }

  TerOptions options_;
  std::function<void()> poll_;
  WordAligner aligner_;
  int64_t walked_ = 0;  // words since the last poll
  std::vector<int32_t> current_, moved_;
  std::vector<int64_t> positions_, first_position_;  // of all numbers, one after the other
  std::vector<char> wrong_;                          // words of the current order
  std::vector<int64_t> partner_, wrong_before_;      // of words of the reference
  std::vector<int64_t> found_, targets_;
  std::vector<TerShift> candidates_[kMostWords];
};

void tag(const Words& hypothesis, const Words& reference, bool end_of_sentence, TerResult& result) {
  std::vector<char>&words = result.wrong_words, &gaps = result.wrong_gaps;
  words.assign(hypothesis.size, false);
  gaps.assign(hypothesis.size + 1, false);
  int64_t i = 0, j = 0;
  for (const int8_t operation : result.operations) {
    const int64_t place = j < hypothesis.size ? result.order[j] : j;
    if (operation == kDeletion)
      gaps[place] = true;
    else
      words[place] = operation != kMatch || hypothesis.written[place] != reference.written[i];
    i += operation != kInsertion;
    j += operation != kDeletion;
  }
  if (!end_of_sentence) return;
  words.push_back(false);
  for (size_t k = 0; k < gaps.size(); ++k) words[k] |= gaps[k];
}

TerResult best_of(Scorer& scorer, const TerPair& pair, bool end_of_sentence) {
  TerResult best = scorer.score(pair.hypothesis, *pair.first);
  int64_t total = pair.first->size;
  for (const Words* reference = pair.first + 1; reference != pair.last; ++reference) {
    TerResult other = scorer.score(pair.hypothesis, *reference);
    total += reference->size;
    if (other.edits >= best.edits) continue;
    best = std::move(other);
    best.reference = reference - pair.first;
  }
  best.reference_length = double(total) / double(pair.last - pair.first);
  tag(pair.hypothesis, pair.first[best.reference], end_of_sentence, best);
  return best;
}

struct Cancelled {};

}  // namespace

std::vector<TerResult> translation_edit_rates(const std::vector<TerPair>& pairs,
                                              const TerOptions& options, int64_t threads,
                                              const std::function<void()>& poll) {
  std::vector<TerResult> results(pairs.size());
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // the first
  const auto guarded = [&](const auto& task) {
    try {
      task();
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
  const auto work = [&](const std::function<void()>& own_poll) {
    guarded([&] {
      Scorer scorer(options, [&] {
        if (failed) throw Cancelled();
        own_poll();
      });
      for (size_t i = next++; i < pairs.size(); i = next++)
        results[i] = best_of(scorer, pairs[i], options.end_of_sentence);
    });
  };
  int64_t cells = 0;
  for (const TerPair& pair : pairs)
    for (const Words* reference = pair.first; reference != pair.last; ++reference)
      cells += pair.hypothesis.size * reference->size;
  const int64_t wanted = std::min({threads, int64_t(pairs.size()), 1 + cells / kCellsOfThread});
  std::vector<std::future<void>> helpers;
  try {
    for (int64_t t = 1; t < wanted; ++t)
      helpers.push_back(std::async(std::launch::async, work, [] {}));
  } catch (const std::exception&) {
    // No more threads, or no memory for them: those that there are do it.
  }
  work(poll);
  guarded([&] {
    for (const std::future<void>& helper : helpers)
      while (helper.wait_for(kBetweenPolls) == std::future_status::timeout) poll();
  });
  helpers.clear();  // waits for those that a failure has cancelled
  if (failure) std::rethrow_exception(failure);
  return results;
}

}  // namespace tokcore
