// Translation edit rate with shifts, as tercom computes it (M. Snover et al., AMTA 2006;
// jhclark/tercom:src/ter/core/TerScorer.java), of sentences whose words are integers.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace tokcore {

struct TerOptions {
  int64_t max_shift_distance;  // 0: no shifts
  int64_t beam;  // cells dearer than their column's best by more are dropped; negative: none are
  bool end_of_sentence;  // wrong_words has one more, of the end
};

struct Words {
  const int64_t* ids;
  const int64_t* written;  // aligned words of which these differ are wrong, though no edit
  int64_t size;
};

// Words [start, end] of the order before the shift go behind word `target` of that order, the
// partner of word `reference` of the reference; -1: to the front.
struct TerShift {
  int64_t start, end, reference, target;
};

struct TerResult {
  int64_t edits = 0;      // shifts included
  int64_t reference = 0;  // which of the references this is about
  std::vector<TerShift> shifts;
  std::vector<int64_t> order;      // the hypothesis' words after all shifts
  std::vector<int8_t> operations;  // on that order, numbered as in common/edit_align.h
  double reference_length = 0;     // the average over all references
  std::vector<char> wrong_words;   // in the hypothesis' own order
  std::vector<char> wrong_gaps;    // words are missing before this one, or at the end
};

// A hypothesis and its references [first, last): the first of those with the fewest edits counts.
struct TerPair {
  Words hypothesis;
  const Words *first, *last;
};

// `poll` is called now and then in the calling thread; what it throws ends all.
std::vector<TerResult> translation_edit_rates(const std::vector<TerPair>& pairs,
                                              const TerOptions& options, int64_t threads,
                                              const std::function<void()>& poll);

}  // namespace tokcore
