// Rewards against their groups. A group is a run of rows, found where it starts: a thread takes a
// range of positions and every group that starts in it. Groups that are scattered are brought
// together bucket by bucket, so that every pass over memory is a stream and what is random stays in
// the cache.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include <cstdint>

#include "common/advantage.h"
#include "cpu/primitives/isa.h"
#if defined(TOKCORE_ISA)
#include "cpu/primitives/simd.h"
#endif

namespace tokcore {

// What can be wrong with values, found on the way: the position of a group (-1: none), and how many
// rewards were scored.
struct AdvantageFaults {
  int64_t scored, infinite, weightless;
};

struct GroupAdvantageRows {
  // The groups that start in [begin, end).
  void (*of_float)(const AdvantageTensors<float>&, int64_t begin, int64_t end, AdvantageFaults&);
  void (*of_double)(const AdvantageTensors<double>&, int64_t begin, int64_t end, AdvantageFaults&);
};
TOKCORE_DECLARE_LEVELS(GroupAdvantageRows, group_advantage_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

// Four rewards at a time, in the compiler's own vectors: every instruction set has them.
using Four = double __attribute__((vector_size(32)));
template <typename T>
struct FourOf;
template <>
struct FourOf<float> {
  using Type = float __attribute__((vector_size(16)));
};
template <>
struct FourOf<double> {
  using Type = Four;
};

// Rewards less the anchor. kFours: groups of 4, 8 or 16 are this many vectors.
template <int kFours>
struct Differences {
  Four d[kFours];

  __attribute__((always_inline)) double sum() const {
    Four total = d[0];
    for (int k = 1; k < kFours; ++k) total += d[k];
    return (total[0] + total[2]) + (total[1] + total[3]);
  }
  __attribute__((always_inline)) double squares() const {
    Four total = d[0] * d[0];
    for (int k = 1; k < kFours; ++k) total += d[k] * d[k];
    return (total[0] + total[2]) + (total[1] + total[3]);
  }
  __attribute__((always_inline)) void less(double mean) {
    for (Four& part : d) part -= mean;
  }
  // All of them equal: differences that are too small to be squared are told from none.
  __attribute__((always_inline)) bool none() const {
    for (const Four& part : d)
      for (int i = 0; i < 4; ++i)
        if (part[i] != 0) return false;
    return true;
  }
};

template <int kFours, typename T>
TOKCORE_INLINE Differences<kFours> differences(const AdvantageTensors<T>& p, int64_t begin) {
  Differences<kFours> result;
  const double anchor = p.rewards[p.row(begin)];
  for (int k = 0; k < kFours; ++k) {
    typename FourOf<T>::Type rewards;
    if (p.order == nullptr) {
      __builtin_memcpy(&rewards, p.rewards + begin + 4 * k, sizeof rewards);
    } else {
      for (int i = 0; i < 4; ++i) rewards[i] = p.rewards[p.order[begin + 4 * k + i]];
    }
    result.d[k] = __builtin_convertvector(rewards, Four) - anchor;
  }
  return result;
}

template <int kFours, typename T>
TOKCORE_INLINE void put(const AdvantageTensors<T>& p, int64_t begin,
                        const Differences<kFours>& centered, double factor) {
  for (int k = 0; k < kFours; ++k) {
    const auto advantages =
        __builtin_convertvector(centered.d[k] * factor, typename FourOf<T>::Type);
    if (p.order == nullptr) {
      __builtin_memcpy(p.advantage + begin + 4 * k, &advantages, sizeof advantages);
    } else {
      for (int i = 0; i < 4; ++i) p.advantage[p.order[begin + 4 * k + i]] = advantages[i];
    }
  }
}

// Up to kTile groups of one usual size that follow each other, all of their rewards finite,
// centered at their means: square roots and divisions, which one group would wait for, overlap.
// Returns how many of them; those from there on are for run_group.
constexpr int kTile = 16;
template <int kFours, typename T>
int64_t run_tile(const AdvantageTensors<T>& p, int64_t begin, int64_t groups) {
  constexpr int kSize = 4 * kFours;
  Differences<kFours> centered[kTile];
  double squares[kTile], factors[kTile];
  for (int64_t g = 0; g < groups; ++g) {
    centered[g] = differences<kFours>(p, begin + g * kSize);
    centered[g].less(centered[g].sum() / kSize);
    squares[g] = centered[g].squares();
  }
  double factor = 1;
  if (p.rules.center == Center::kLeaveOneOut) factor = double(kSize) / (kSize - 1);
  for (int64_t g = 0; g < groups; ++g)
    factors[g] =
        p.rules.scale == Scale::kNone
            ? factor
            : factor / (__builtin_sqrt(squares[g] / double(kSize - p.rules.ddof)) + p.rules.eps);
  for (int64_t g = 0; g < groups; ++g) {
    if (squares[g] - squares[g] != 0) return g;  // something is NaN or infinite, or overflows
    if (squares[g] == 0) {
      if (!centered[g].none()) return g;
      factors[g] = 0;
    }
    put(p, begin + g * kSize, centered[g], factors[g]);
  }
  return groups;
}

template <typename T>
int64_t run_tile_of(const AdvantageTensors<T>& p, int64_t begin, int64_t size, int64_t groups) {
  if (size == 4) return run_tile<1>(p, begin, groups);
  if (size == 8) return run_tile<2>(p, begin, groups);
  if (size == 16) return run_tile<4>(p, begin, groups);
  return 0;
}

// Where the group that starts at `begin` ends.
template <typename T>
TOKCORE_INLINE int64_t end_of(const AdvantageTensors<T>& p, int64_t begin) {
  if (p.group_size > 0) return begin + p.group_size;
  const int64_t id = p.group[p.row(begin)];
  int64_t next = begin + 1;
  while (next < p.rows && p.group[p.row(next)] == id) ++next;
  return next;
}

template <typename T>
void groups(const AdvantageTensors<T>& p, int64_t begin, int64_t end, AdvantageFaults& faults) {
  __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED);
  const AdvantageRules& rules = p.rules;
  const bool plain = (rules.center == Center::kMean || rules.center == Center::kLeaveOneOut) &&
                     rules.scale != Scale::kMean && p.mean == nullptr;
  while (begin < end && !p.starts(begin)) ++begin;
  while (begin < end) {
    int64_t next = end_of(p, begin), count = 1;
    const int64_t n = next - begin;
    for (; plain && count < kTile && next < end && n <= 16 && n % 4 == 0; ++count) {
      const int64_t after = end_of(p, next);
      if (after - next != n) break;
      next = after;
    }
    int64_t done = plain ? run_tile_of(p, begin, n, count) : 0;
    faults.scored += done * n;
    for (; done < count; ++done) {
      const int64_t from = begin + done * n;
      const GroupSums sums = run_group(p, from, from + n);
      faults.scored += int64_t(sums.scored);
      if (sums.offset - sums.offset != 0) faults.infinite = from;
      if (p.weights != nullptr && sums.scored > 0 && !(sums.weight > 0)) faults.weightless = from;
    }
    begin = next;
  }
}

}  // namespace

extern const GroupAdvantageRows group_advantage_rows = {groups<float>, groups<double>};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "common/advantage_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

// Rows that are brought together at a time: their rewards, ids and order stay in a second-level
// cache.
constexpr int64_t kBucketRows = 16384;

void run(const AdvantageTensors<float>& p, int64_t begin, int64_t end, AdvantageFaults& faults) {
  TOKCORE_CHOSEN(group_advantage_rows).of_float(p, begin, end, faults);
}
void run(const AdvantageTensors<double>& p, int64_t begin, int64_t end, AdvantageFaults& faults) {
  TOKCORE_CHOSEN(group_advantage_rows).of_double(p, begin, end, faults);
}

// The faults of all threads.
struct SharedFaults {
  std::atomic<int64_t> scored{0}, infinite{-1}, weightless{-1};

  void add(const AdvantageFaults& faults) {
    scored += faults.scored;
    if (faults.infinite >= 0) infinite = faults.infinite;
    if (faults.weightless >= 0) weightless = faults.weightless;
  }
};

template <typename T>
void run_groups(const AdvantageTensors<T>& p, SharedFaults& shared) {
  parallel_units(p.rows, 1, [&](int64_t begin, int64_t end) {
    AdvantageFaults faults = {0, -1, -1};
    run(p, begin, end, faults);
    shared.add(faults);
  });
}

bool is_sorted(const int64_t* group, int64_t rows) {
  std::atomic<bool> sorted{true};
  parallel_units(rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end + 1, rows);
    bool here = true;
    for (int64_t i = begin + 1; i < last; ++i) here &= group[i - 1] <= group[i];
    if (!here) sorted = false;
  });
  return sorted;
}

// Positions of rows by rising id in [0, count), and as they came within one.
void order_by(const int64_t* ids, int64_t rows, int64_t count, std::vector<int64_t>& next,
              int64_t* order) {
  next.assign(count + 1, 0);
  for (int64_t i = 0; i < rows; ++i) ++next[ids[i] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (int64_t i = 0; i < rows; ++i) order[next[ids[i]]++] = i;
}

// Scattered groups whose ids, less `least`, are below `count`: rows are dealt into buckets of
// neighbouring ids, each bucket is ordered and run by itself, and its results are taken back in the
// order in which its rows were dealt. Every thread deals a range of the rows to places of its own,
// so that a bucket holds them as they came.
template <typename T>
struct Buckets {
  const AdvantageTensors<T>& p;
  int64_t least, count;
  int shift = 0;  // of an id, to its bucket
  int64_t buckets = 1, ranges = 1;
  std::vector<int64_t> places = {};  // (ranges, buckets): where the first such row goes
  std::unique_ptr<int64_t[]> ids = {};
  std::unique_ptr<T[]> rewards = {}, weights = {}, advantage = {}, mean = {}, deviation = {};

  uint64_t id(int64_t row) const { return uint64_t(p.group[row]) - uint64_t(least); }

  // visit(row, next) for every row, where next[bucket] is the place of its next row.
  template <typename Visit>
  void for_each_row(const Visit& visit) {
    torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::vector<int64_t> next(places.begin() + r * buckets, places.begin() + (r + 1) * buckets);
        const int64_t last = p.rows * (r + 1) / ranges;
        for (int64_t row = p.rows * r / ranges; row < last; ++row)
          visit(row, next[id(row) >> shift]++);
      }
    });
  }

  void deal() {
    // As many ids a bucket as hold kBucketRows rows on average.
    while (((count - 1) >> shift) + 1 > p.rows / kBucketRows + 1) ++shift;
    buckets = ((count - 1) >> shift) + 1;
    if (p.rows > kBucketRows) ranges = torch::stable::get_num_threads();
    places.assign(ranges * buckets, 0);
    torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::vector<int64_t> found(buckets);
        const int64_t last = p.rows * (r + 1) / ranges;
        for (int64_t row = p.rows * r / ranges; row < last; ++row) ++found[id(row) >> shift];
        std::copy(found.begin(), found.end(), places.begin() + r * buckets);
      }
    });
    int64_t place = 0;
    for (int64_t b = 0; b < buckets; ++b)
      for (int64_t r = 0; r < ranges; ++r) place += std::exchange(places[r * buckets + b], place);
    ids.reset(new int64_t[p.rows]);
    for (auto* column : {&rewards, &advantage}) column->reset(new T[p.rows]);
    if (p.weights != nullptr) weights.reset(new T[p.rows]);
    if (p.mean != nullptr) {
      mean.reset(new T[p.rows]);
      deviation.reset(new T[p.rows]);
    }
    const uint64_t low = (uint64_t(1) << shift) - 1;
    for_each_row([&](int64_t row, int64_t to) {
      ids[to] = int64_t(id(row) & low);
      rewards[to] = p.rewards[row];
      if (weights) weights[to] = p.weights[row];
    });
  }

  void run_all(SharedFaults& shared) {
    parallel_units(buckets, kBucketRows, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> next, order;
      AdvantageFaults faults = {0, -1, -1};
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = places[b];
        const int64_t rows = (b + 1 < buckets ? places[b + 1] : p.rows) - first;
        order.resize(rows);
        order_by(ids.get() + first, rows, int64_t(1) << shift, next, order.data());
        AdvantageTensors<T> part = p;
        part.rows = rows;
        part.group = ids.get() + first;
        part.order = order.data();
        part.rewards = rewards.get() + first;
        part.advantage = advantage.get() + first;
        if (weights) part.weights = weights.get() + first;
        if (mean) {
          part.mean = mean.get() + first;
          part.deviation = deviation.get() + first;
        }
        run(part, 0, rows, faults);
      }
      shared.add(faults);
    });
  }

  void take_back() {
    for_each_row([&](int64_t row, int64_t from) {
      p.advantage[row] = advantage[from];
      if (!mean) return;
      p.mean[row] = mean[from];
      p.deviation[row] = deviation[from];
    });
  }
};

template <typename T>
void run_scattered(AdvantageTensors<T> p, SharedFaults& shared) {
  const auto [least, most] = std::minmax_element(p.group, p.group + p.rows);
  const uint64_t range = uint64_t(*most) - uint64_t(*least);
  if (range < 4 * uint64_t(p.rows)) {
    Buckets<T> buckets{p, *least, int64_t(range) + 1};
    buckets.deal();
    buckets.run_all(shared);
    buckets.take_back();
    return;
  }
  // Ids far apart (hashes): sorted.
  std::vector<int64_t> order(p.rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return p.group[a] < p.group[b]; });
  p.order = order.data();
  run_groups(p, shared);
}

void check_faults(const char* op, const SharedFaults& faults, int64_t rows) {
  check(faults.infinite < 0, op,
        "rewards must be finite (NaN = not scored; infinite='unscored' drops infinities), got an "
        "infinity");
  check(faults.scored > 0 || rows == 0, op, "rewards must hold one that is not NaN, got ", rows,
        " without any");
  check(faults.weightless < 0, op,
        "lengths must be positive in sum over each group (are all of its completions empty?), got "
        "a group without");
}

std::tuple<Tensor, Tensor, Tensor> group_advantage_cpu(
    const Tensor& rewards, const std::optional<Tensor>& group, const std::optional<Tensor>& order,
    const std::optional<Tensor>& weights, int64_t group_size, int64_t center, int64_t scale,
    int64_t ddof, int64_t singleton, double eps, bool contiguous, bool with_statistics) {
  const char* op = "group_advantage";
  const AdvantageCall call = checked_advantage(op, rewards, group, order, weights, group_size,
                                               center, scale, ddof, singleton, eps);
  const Shape shape = {call.rows}, none = {0};
  Tensor advantage = new_gradient(rewards);
  Tensor mean = new_empty(rewards, with_statistics ? shape : none);
  Tensor deviation = new_empty(rewards, with_statistics ? shape : none);
  SharedFaults faults;
  const auto run_all = [&](auto zero) {
    using T = decltype(zero);
    const AdvantageTensors<T> p = call.tensors<T>(advantage, mean, deviation);
    const bool together = p.group == nullptr || contiguous || p.order != nullptr;
    if (together || is_sorted(p.group, p.rows))
      run_groups(p, faults);
    else
      run_scattered(p, faults);
  };
  rewards.scalar_type() == ScalarType::Double ? run_all(double()) : run_all(float());
  check_faults(op, faults, call.rows);
  return {advantage, mean, deviation};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&tokcore::group_advantage_cpu));
}

#endif
