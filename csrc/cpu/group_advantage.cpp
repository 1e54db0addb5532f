// Rewards against their groups. A group is a run of rows, found where it starts: a thread takes a
// range of positions and every group that starts in it. Groups that are scattered are first brought
// together by an order of the rows.
//
// Memory decides, not arithmetic, so there are no rows for the instruction sets.
#if !defined(TOKCORE_ISA)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "common/advantage_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

bool is_sorted(const int64_t* group, int64_t rows) {
  std::atomic<bool> sorted{true};
  parallel_units(rows, 1, [&](int64_t begin, int64_t end) {
    if (!std::is_sorted(group + begin, group + std::min(end + 1, rows))) sorted = false;
  });
  return sorted;
}

// The rows by rising group, and as they came within one.
std::vector<int64_t> sorted_order(const int64_t* group, int64_t rows) {
  std::vector<int64_t> order(rows);
  const auto [least, most] = std::minmax_element(group, group + rows);
  const uint64_t range = uint64_t(*most) - uint64_t(*least);
  if (range < uint64_t(2 * rows)) {  // small numbers are counted
    std::vector<int64_t> next(range + 2);
    for (int64_t row = 0; row < rows; ++row) ++next[group[row] - *least + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t row = 0; row < rows; ++row) order[next[group[row] - *least]++] = row;
  } else {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return group[a] < group[b]; });
  }
  return order;
}

// What can be wrong with values, found on the way; the texts come after the loop, outside of it.
struct Faults {
  std::atomic<int64_t> scored{0}, infinite{-1}, weightless{-1};
};

template <typename T>
void run_groups(const AdvantageTensors<T>& p, Faults& faults) {
  parallel_units(p.rows, 1, [&](int64_t begin, int64_t end) {
    int64_t scored = 0;
    while (begin < end && !p.starts(begin)) ++begin;
    while (begin < end) {
      int64_t next = begin + 1;
      if (p.group_size > 0) {
        next = begin + p.group_size;
      } else {
        while (next < p.rows && !p.starts(next)) ++next;
      }
      const GroupSums sums = run_group(p, begin, next);
      scored += int64_t(sums.scored);
      if (sums.offset - sums.offset != 0) faults.infinite = begin;
      if (p.weights != nullptr && sums.scored > 0 && !(sums.weight > 0)) faults.weightless = begin;
      begin = next;
    }
    faults.scored += scored;
  });
}

void check_faults(const char* op, const Faults& faults, int64_t rows) {
  check(faults.infinite < 0, op,
        "rewards must be finite (NaN = not scored; infinite='unscored' drops infinities), got an "
        "infinity in the group that starts at position ",
        faults.infinite.load());
  check(faults.scored > 0 || rows == 0, op, "rewards must hold one that is not NaN, got ", rows,
        " without any");
  check(faults.weightless < 0, op,
        "weights must be positive in sum over each group (are all of its completions empty?), "
        "got none in the group that starts at position ",
        faults.weightless.load());
}

std::tuple<Tensor, Tensor, Tensor> group_advantage_cpu(
    const Tensor& rewards, const std::optional<Tensor>& group, const std::optional<Tensor>& order,
    const std::optional<Tensor>& weights, int64_t group_size, int64_t center, int64_t scale,
    int64_t ddof, int64_t singleton, double eps, bool contiguous, bool infinite_unscored,
    bool with_statistics) {
  const char* op = "group_advantage";
  const AdvantageCall call =
      checked_advantage(op, rewards, group, order, weights, group_size, center, scale, ddof,
                        singleton, eps, infinite_unscored);
  const Shape shape = {call.rows}, none = {0};
  std::vector<int64_t> sorted;
  const int64_t* ids = data_or_null<int64_t>(call.group);
  const int64_t* given = data_or_null<int64_t>(call.order);
  if (ids != nullptr && !contiguous && given == nullptr && !is_sorted(ids, call.rows)) {
    sorted = sorted_order(ids, call.rows);
    given = sorted.data();
  }
  Tensor advantage = new_empty(rewards, shape);
  Tensor mean = new_empty(rewards, with_statistics ? shape : none);
  Tensor deviation = new_empty(rewards, with_statistics ? shape : none);
  Faults faults;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    AdvantageTensors<T> p = call.tensors<T>(advantage, mean, deviation);
    p.order = given;
    run_groups(p, faults);
  };
  rewards.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  check_faults(op, faults, call.rows);
  return {advantage, mean, deviation};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&tokcore::group_advantage_cpu));
}

#endif
