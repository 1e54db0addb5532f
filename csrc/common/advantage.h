// A reward against the rewards of its group: the one definition that CPU and CUDA share.
//
// Everything is summed in double over d = reward - anchor, the anchor being a reward of the group:
// equal rewards have d = 0, so their advantage is 0 exactly, and a small spread on a large reward
// keeps its digits.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/fields.h"

namespace tokcore {
namespace {

// The numbers are those of the schema; tokcore/ops/group_advantage.py has the names.
enum class Center : int64_t { kMean, kLeaveOneOut, kWeightedMean, kBest, kNone };
enum class Scale : int64_t { kNone, kDeviation, kMean };
enum class Singleton : int64_t { kZero, kReward };

constexpr double kUnscored = std::numeric_limits<double>::quiet_NaN();

struct AdvantageRules {
  Center center;
  Scale scale;
  Singleton singleton;
  int64_t ddof;
  double eps;
};

// Rows in the order in which they are grouped; a group is a run of them.
template <typename T>
struct AdvantageTensors {
  AdvantageRules rules;
  int64_t rows, group_size;  // group_size 0: by `group`
  const int64_t *group, *order;
  const T *rewards, *weights;       // weights null: none
  T *advantage, *mean, *deviation;  // mean and deviation null: not wanted

  TOKCORE_FIELDS_HD int64_t row(int64_t position) const {
    return order == nullptr ? position : order[position];
  }
  TOKCORE_FIELDS_HD bool starts(int64_t position) const {
    if (group_size > 0) return position % group_size == 0;
    return position == 0 || group[row(position)] != group[row(position - 1)];
  }
};

TOKCORE_FIELDS_HD bool is_scored(double reward) { return reward == reward; }

struct GroupSums {
  double scored = 0, offset = 0, weight = 0, weighted = 0;
};
struct GroupSquares {
  double squares = 0;
};
template <typename acc_t>
struct TopTwo {
  acc_t first = -std::numeric_limits<acc_t>::infinity();
  acc_t second = -std::numeric_limits<acc_t>::infinity();
};
template <typename acc_t>
TOKCORE_FIELDS_HD TopTwo<acc_t> merge(const TopTwo<acc_t>& a, const TopTwo<acc_t>& b,
                                      acc_t /* scale: block_merge passes one */) {
  if (a.first < b.first) return {b.first, a.first < b.second ? b.second : a.first};
  return {a.first, b.first < a.second ? a.second : b.first};
}

template <typename T>
TOKCORE_FIELDS_HD void add_reward(const AdvantageTensors<T>& p, int64_t row, double anchor,
                                  GroupSums& sums, TopTwo<double>& top) {
  const double reward = p.rewards[row];
  if (!is_scored(reward)) return;
  const double d = reward - anchor;
  sums.scored += 1;
  sums.offset += d;
  if (p.weights != nullptr) {
    sums.weight += p.weights[row];
    sums.weighted += p.weights[row] * d;
  }
  if (p.rules.center == Center::kBest) top = merge(top, {reward, -HUGE_VAL}, 0.0);
}

// What a group's rewards are measured by.
struct GroupStatistics {
  double anchor, scored, offset, center, deviation, best, second;  // offset: of the mean
};

TOKCORE_FIELDS_HD GroupStatistics group_statistics(const AdvantageRules& rules, double anchor,
                                                   const GroupSums& sums,
                                                   const TopTwo<double>& top) {
  GroupStatistics group = {anchor,    sums.scored, sums.offset / sums.scored, 0, 0,
                           top.first, top.second};
  group.center = group.offset;
  if (rules.center == Center::kWeightedMean) group.center = sums.weighted / sums.weight;
  return group;
}

template <typename T>
TOKCORE_FIELDS_HD void add_square(const AdvantageTensors<T>& p, int64_t row,
                                  const GroupStatistics& group, GroupSquares& sums) {
  const double reward = p.rewards[row];
  if (!is_scored(reward)) return;
  const double d = reward - group.anchor - group.offset;
  sums.squares += d * d;
}

TOKCORE_FIELDS_HD void set_deviation(const AdvantageRules& rules, const GroupSquares& sums,
                                     GroupStatistics& group) {
  const double over = group.scored - double(rules.ddof);
  group.deviation = over > 0 ? std::sqrt(sums.squares / over) : 0;
}

template <typename T>
TOKCORE_FIELDS_HD double advantage_of(const AdvantageTensors<T>& p, const GroupStatistics& group,
                                      double reward) {
  const AdvantageRules& rules = p.rules;
  if (!is_scored(reward)) return 0;
  if (group.offset - group.offset != 0) return kUnscored;  // an infinity is among them
  if (group.scored == 1 && rules.center != Center::kNone)
    return rules.singleton == Singleton::kReward ? reward : 0;
  double advantage = reward - group.anchor - group.center;
  if (rules.center == Center::kNone) advantage = reward;
  if (rules.center == Center::kLeaveOneOut) advantage *= group.scored / (group.scored - 1);
  if (rules.center == Center::kBest) advantage = reward < group.best ? 0 : reward - group.second;
  if (rules.scale == Scale::kNone || advantage == 0) return advantage;
  if (rules.scale == Scale::kMean) {
    const double mean = group.anchor + group.offset;
    return mean > 0 ? advantage / mean : mean <= 0 ? 0 : mean;
  }
  return advantage / (group.deviation + rules.eps);
}

template <typename T>
TOKCORE_FIELDS_HD void put_advantage(const AdvantageTensors<T>& p, int64_t row,
                                     const GroupStatistics& group) {
  p.advantage[row] = T(advantage_of(p, group, p.rewards[row]));
  if (p.mean == nullptr) return;
  p.mean[row] = T(group.anchor + group.offset);
  p.deviation[row] = T(group.deviation);
}

// The first scored reward of [begin, end), or NaN.
template <typename T>
TOKCORE_FIELDS_HD double find_anchor(const AdvantageTensors<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    if (is_scored(p.rewards[p.row(i)])) return p.rewards[p.row(i)];
  return kUnscored;
}

// A group from its first row to its last, by one thread.
template <typename T>
TOKCORE_FIELDS_HD GroupSums run_group(const AdvantageTensors<T>& p, int64_t begin, int64_t end) {
  const double anchor = find_anchor(p, begin, end);
  GroupSums sums;
  TopTwo<double> top;
  for (int64_t i = begin; i < end; ++i) add_reward(p, p.row(i), anchor, sums, top);
  GroupStatistics group = group_statistics(p.rules, anchor, sums, top);
  if (p.rules.scale == Scale::kDeviation || p.deviation != nullptr) {
    GroupSquares squares;
    for (int64_t i = begin; i < end; ++i) add_square(p, p.row(i), group, squares);
    set_deviation(p.rules, squares, group);
  }
  for (int64_t i = begin; i < end; ++i) put_advantage(p, p.row(i), group);
  return sums;
}

}  // namespace
}  // namespace tokcore
