// Windowed sums of attention weights, brought one step on: rows that leave the window are taken
// off, the new ones are written to the ring and added. Integers all the way (common/kv_state.h), so
// the lists are summed in any order on any number of threads. Most of a row is zeros, which the
// cache brings along: nothing here is worth an instruction set of its own, so the rows of the
// levels are empty.
#if !defined(TOKCORE_ISA)

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/window_scores_update_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

void check_steps(const char* op, const WindowUpdate& p) {
  for (int64_t b = 0; b < p.sizes.batch; ++b) {
    const WindowStep at = p.step_of_row(b);
    check(at.step >= -1, op, "step must be at least -1, got ", at.step, " in row ", b);
    check(at.window >= 0 && (p.ring_rows == 0 || at.window <= p.ring_rows), op,
          "window must lie in [0, R = ", p.ring_rows, "], got ", at.window, " in row ", b);
    check(at.oldest >= 0 && at.oldest <= at.step + 1, op,
          "oldest must lie in [0, step + 1 = ", at.step + 1, "], got ", at.oldest, " in row ", b);
  }
}

// Weights of a query that count.
int64_t weighed(const WindowUpdate& p, const WindowStep& at, int64_t list, int64_t query) {
  return p.index != nullptr ? p.count[list] : at.visible(query, p.count[list]);
}

void check_lists(const char* op, const WindowUpdate& p) {
  check_counts(op, p.count, p.sizes, p.listed);
  for (int64_t list = 0; list < p.sizes.all_lists(); ++list) {
    const int64_t b = list / p.sizes.lists, s = list % p.sizes.lists;
    const int32_t* index = p.index == nullptr ? nullptr : p.index + list * p.listed;
    for (int64_t m = 0; index != nullptr && m < p.count[list]; ++m)
      check(index[m] >= 0 && index[m] < p.sizes.slots && (m == 0 || index[m - 1] < index[m]), op,
            "index must hold ascending slots in [0, C = ", p.sizes.slots, "), got ", index[m],
            " at entry ", m, " of list ", s, " of row ", b);
    const WindowStep at = p.step_of_row(b);
    for (int64_t query = 0; query < p.queries; ++query) {
      if (!at.enters(query)) continue;
      const float* weights = p.weights(list, query);
      for (int64_t m = 0; m < weighed(p, at, list, query); ++m)
        check(is_weight(weights[m]), op, "rows must be finite and at most ", kMostWeight,
              " in size, got ", weights[m], " for query ", query, " of list ", s, " of row ", b);
    }
  }
}

void leave(const WindowUpdate& p, int64_t list, int64_t at) {
  float* row = p.ring_row(list, at);
  int64_t* score = p.score + list * p.sizes.slots;
  for (int64_t j = 0; j < p.sizes.slots; ++j) {
    score[j] = wrapping_sum(score[j], -fixed_point(row[j]));
    row[j] = 0;
  }
}

void enter(const WindowUpdate& p, int64_t list, int64_t at, const float* weights, int64_t weighed) {
  const int32_t* index = p.index == nullptr ? nullptr : p.index + list * p.listed;
  int64_t* score = p.score + list * p.sizes.slots;
  float* row = nullptr;
  if (p.ring_rows > 0) {
    row = p.ring_row(list, at);
    std::fill_n(row, p.sizes.slots, 0.0f);
  }
  for (int64_t m = 0; m < weighed; ++m) {
    const int64_t j = index == nullptr ? m : index[m];
    score[j] = wrapping_sum(score[j], fixed_point(weights[m]));
    if (row != nullptr) row[j] = weights[m];
  }
}

void update_list(const WindowUpdate& p, int64_t list) {
  const WindowStep at = p.step_of_row(list / p.sizes.lists);
  for (int64_t t = at.oldest; t < at.leaving_end(); ++t) leave(p, list, t);
  for (int64_t query = 0; query < p.queries; ++query)
    if (at.enters(query))
      enter(p, list, at.step_of(query), p.weights(list, query), weighed(p, at, list, query));
  if (at.step < 0 || p.queries == 0) return;
  int32_t* last = p.last_selected + list * p.sizes.slots;
  for (int64_t m = 0; m < p.count[list]; ++m) {
    const int64_t j = p.index == nullptr ? m : p.index[list * p.listed + m];
    last[j] = std::max(last[j], int32_t(at.step));
  }
}

void window_scores_update_cpu(Tensor score, Tensor ring, Tensor last_selected, Tensor oldest,
                              const Tensor& rows, const std::optional<Tensor>& index,
                              const Tensor& count, const Tensor& step, const Tensor& window) {
  const char* op = "window_scores_update";
  const WindowUpdateCall call = checked_window_update(op, score, ring, last_selected, oldest, rows,
                                                      index, count, step, window);
  const WindowUpdate& p = call.p;
  check_steps(op, p);
  check_lists(op, p);
  parallel_units(p.sizes.all_lists(), (1 + p.queries) * p.sizes.slots,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t list = begin; list < end; ++list) update_list(p, list);
                 });
  for (int64_t b = 0; b < p.sizes.batch; ++b)
    p.oldest[b] = int32_t(p.step_of_row(b).oldest_after());
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("window_scores_update", TORCH_BOX(&tokcore::window_scores_update_cpu));
}

#endif
