// The policy losses of the group-relative methods, a token at a time: the one definition that CPU
// and CUDA share. Everything is computed in double, whatever comes in: a token costs a few hundred
// operations, its row of the vocabulary costs V.
//
// A row (sequence) is visited twice: its sums first (PolicySums), which settle what its tokens have
// in common (PolicyRow), then its tokens (PolicyTerm). Where a ratio belongs to the row as a whole,
// every token's gradient also needs a sum over the second visit; it is added by a third.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/fields.h"
#include "common/online_softmax.h"

namespace tokcore {
namespace {

// The numbers are those of the schema; tokcore/ops/policy_loss.py has the names.
enum class Surrogate : int64_t { kClip, kCispo, kSapo, kVespo, kGmpo, kDppo, kReinforce };
enum class RatioLevel : int64_t { kToken, kSequence, kSequenceToken, kSequenceSum };
enum class KlEstimator : int64_t { kNone, kK1, kK2, kK3, kAbs };
// The ratio of trainer to sampler: none, given for each token or row, or computed from the
// sampler's log-probabilities for each token or row and then bounded.
enum class Importance : int64_t { kNone, kToken, kRow, kTokenComputed, kRowComputed };
// Weight of a token: 1 or 1 / n (tokens of its row), over tokens, rows, rows times a length, or 1.
enum class Aggregation : int64_t {
  kTokenMean,
  kSeqMeanTokenMean,
  kSeqMeanTokenSum,
  kSeqMeanTokenSumNorm,
  kTokenSum
};

struct PolicyRules {
  Surrogate surrogate;
  RatioLevel level;
  KlEstimator kl;
  Aggregation aggregation;
  Importance importance;
  bool mask_importance;  // a computed ratio out of bounds is 0, not the bound
  bool row_advantages;   // one advantage a row, not a token
  bool corrected_kl;     // KL times the ratio
  bool count_empty;      // rows without a token count as rows
  bool trl_padding;  // as TRL has it: LUSPO averages over padding, VESPO reads ratios of padding
  double parameters[4];  // of the surrogate: see surrogate_of
  double log_ratio_limit, kl_coefficient, kl_log_limit, kl_limit, off_policy_threshold;
  double least_importance, most_importance, entropy_coefficient, accumulation, length;

  // Whether a ratio belongs to a row as a whole, and so is counted once a row.
  TOKCORE_HOST_DEVICE bool of_rows() const { return level != RatioLevel::kToken && row_advantages; }
  // GMPO clips the tokens of its rows one by one.
  TOKCORE_HOST_DEVICE bool clips_rows() const { return of_rows() && surrogate != Surrogate::kGmpo; }
};

constexpr double kPolicyInfinity = std::numeric_limits<double>::infinity();
constexpr double kPolicyNaN = std::numeric_limits<double>::quiet_NaN();

// What stands at one position. A field whose tensor is absent is what the rules take for it.
struct PolicyToken {
  double logprob, old, reference, advantage, entropy;
  double importance;         // as given
  double sampler_log_ratio;  // old - sampler
};

template <typename T>
TOKCORE_HOST_DEVICE T policy_clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;  // NaN stays
}

// The sums of a row's first visit.
struct PolicySums {
  double tokens = 0, log_ratio = 0, drift = 0, sampler = 0, vespo = 0;
};

// VESPO's bounds of a logarithm: of one token's log-ratio, and of a row's.
constexpr double kVespoLimit = 20, kVespoLeast = -18.420680743952367;  // ln 1e-8

TOKCORE_HOST_DEVICE double bounded_importance(const PolicyRules& rules, double log_ratio) {
  const double ratio = std::exp(log_ratio);
  const double bounded = policy_clamp(ratio, rules.least_importance, rules.most_importance);
  return rules.mask_importance && bounded != ratio ? 0.0 : bounded;
}

// A token's own ratio of trainer to sampler; 1 where it has none.
TOKCORE_HOST_DEVICE double token_importance(const PolicyRules& rules, const PolicyToken& token) {
  if (rules.importance == Importance::kToken) return token.importance;
  if (rules.importance == Importance::kTokenComputed)
    return bounded_importance(rules, token.sampler_log_ratio);
  return 1;
}

TOKCORE_HOST_DEVICE double vespo_log(double importance) {
  return policy_clamp(std::log(importance), kVespoLeast, kVespoLimit);
}

// GMPO clips the logarithm, on the side that the advantage's sign would push it.
struct GmpoLog {
  double value, slope;
};
TOKCORE_HOST_DEVICE GmpoLog gmpo_log(const PolicyRules& rules, double log_ratio, double advantage) {
  const double low = -rules.parameters[0], high = rules.parameters[1];
  if (advantage > 0 && log_ratio > high) return {high, 0};
  if (advantage <= 0 && log_ratio < low) return {low, 0};
  return {log_ratio, 1};
}

TOKCORE_HOST_DEVICE void add_token(const PolicyRules& rules, const PolicyToken& token,
                                   PolicySums& sums) {
  const double log_ratio = token.logprob - token.old;
  sums.tokens += 1;
  sums.log_ratio += rules.surrogate == Surrogate::kGmpo
                        ? gmpo_log(rules, log_ratio, token.advantage).value
                        : log_ratio;
  sums.drift += token.old - token.sampler_log_ratio - token.logprob;  // sampler, or old, - policy
  sums.sampler += token.sampler_log_ratio;
  if (rules.surrogate == Surrogate::kVespo) {
    sums.vespo += policy_clamp(log_ratio, -kVespoLimit, kVespoLimit);
    sums.vespo += vespo_log(token_importance(rules, token));
  }
}

// What a row's tokens have in common.
struct PolicyRow {
  double tokens;
  double ratio, ratio_slope;  // of a sequence level, and d ratio / d (sum of the log-ratios)
  double importance;          // 1 where each token has its own
  double phi_positive, phi_negative;
  bool off_policy;
  double weight;  // of each of its tokens, but for what is known only of the whole batch
};

TOKCORE_HOST_DEVICE double vespo_phi(double log_weight, double k, double lambda) {
  if (lambda < 1e-4) lambda = 1e-4;
  const double phi = std::exp(lambda + k * log_weight - lambda * std::exp(log_weight));
  return phi < kPolicyInfinity ? phi : 0.0;  // NaN too
}

TOKCORE_HOST_DEVICE PolicyRow policy_row(const PolicyRules& rules, const PolicySums& sums,
                                         int64_t width, double importance) {
  PolicyRow row = {};
  const double tokens = sums.tokens > 1 ? sums.tokens : 1;
  row.tokens = sums.tokens;
  const double per = rules.level == RatioLevel::kSequenceSum ? 1 : 1 / tokens;
  const double log_ratio = sums.log_ratio * per;
  const double limited = policy_clamp(log_ratio, -rules.log_ratio_limit, rules.log_ratio_limit);
  row.ratio = std::exp(limited);
  row.ratio_slope = limited == log_ratio ? row.ratio * per : 0;
  row.off_policy = sums.drift / tokens > rules.off_policy_threshold;
  row.importance = 1;
  if (rules.importance == Importance::kRow) row.importance = importance;
  if (rules.importance == Importance::kRowComputed)
    row.importance = bounded_importance(rules, sums.sampler);
  if (rules.surrogate == Surrogate::kVespo) {
    const double log_weight =
        policy_clamp(sums.vespo + vespo_log(row.importance), kVespoLeast, kVespoLimit);
    const double* p = rules.parameters;
    row.phi_positive = vespo_phi(log_weight, p[0], p[1]);
    row.phi_negative = vespo_phi(log_weight, p[2], p[3]);
  }
  row.weight = rules.aggregation == Aggregation::kSeqMeanTokenMean ? 1 / tokens : 1;
  if (rules.trl_padding && rules.aggregation == Aggregation::kSeqMeanTokenSum)
    row.weight = sums.tokens / double(width > 1 ? width : 1);
  return row;
}

// A loss with its derivatives: by the ratio, and by the log-probability where the ratio stands.
struct PolicyPart {
  double value, by_ratio, direct;
};

// One of two losses by `first < second`; where they are equal, half of each (torch.min).
TOKCORE_HOST_DEVICE PolicyPart least_of(const PolicyPart& a, const PolicyPart& b) {
  if (a.value < b.value) return a;
  if (b.value < a.value) return b;
  return {a.value, (a.by_ratio + b.by_ratio) / 2, 0};
}

// The surrogates, as losses. parameters: clip (low, high, delta, dual), cispo (low, high), sapo
// (temperature of A > 0, of A <= 0), vespo (k and lambda of A >= 0, of A < 0), gmpo (low, high of
// the log-ratio), dppo (bounds of the probability's fall and rise, weight of the squared
// log-ratio). A bound at its very value is inside.
TOKCORE_HOST_DEVICE PolicyPart surrogate_of(const PolicyRules& rules, const PolicyToken& token,
                                            const PolicyRow& row, double ratio) {
  const double* p = rules.parameters;
  const double advantage = token.advantage;
  if (advantage == 0 && rules.surrogate != Surrogate::kDppo) return {0, 0, 0};
  switch (rules.surrogate) {
    case Surrogate::kClip: {
      const double low = 1 - p[0], high = 1 + p[1];
      const bool inside = ratio >= low && ratio <= high, below = ratio <= p[2];
      PolicyPart part =
          least_of({(below ? ratio : p[2]) * advantage, below ? advantage : 0, 0},
                   {policy_clamp(ratio, low, high) * advantage, inside ? advantage : 0, 0});
      part = {-part.value, -part.by_ratio, 0};
      if (advantage < 0 && p[3] < kPolicyInfinity) part = least_of(part, {-p[3] * advantage, 0, 0});
      return part;
    }
    case Surrogate::kCispo: {
      const double weight = -policy_clamp(ratio, p[0], p[1]) * advantage;
      return {weight * token.logprob, 0, weight};
    }
    case Surrogate::kSapo: {
      const double temperature = advantage > 0 ? p[0] : p[1];
      const double gate = 1 / (1 + std::exp(-temperature * (ratio - 1)));
      return {-4 / temperature * gate * advantage, -4 * gate * (1 - gate) * advantage, 0};
    }
    case Surrogate::kVespo: {
      const double weight = -(advantage >= 0 ? row.phi_positive : row.phi_negative) * advantage;
      return {weight * token.logprob, 0, weight};
    }
    case Surrogate::kGmpo:
      return {-ratio * advantage, -advantage, 0};
    case Surrogate::kDppo: {
      const double log_ratio = token.logprob - token.old;
      const double moved = std::exp(token.logprob) - std::exp(token.old);
      const bool keep = advantage != 0 && (advantage > 0 ? moved <= p[1] : moved >= -p[0]);
      return {(keep ? -advantage * ratio : 0) + p[2] * log_ratio * log_ratio, keep ? -advantage : 0,
              2 * p[2] * log_ratio};
    }
    case Surrogate::kReinforce:
      break;
  }
  return {-advantage * token.logprob, 0, -advantage};
}

// KL(policy || reference) as estimated from the sampled token, d = log q - log p, and its
// derivative by log p.
struct PolicyKl {
  double value, slope;
};
TOKCORE_HOST_DEVICE PolicyKl kl_estimate(const PolicyRules& rules, const PolicyToken& token) {
  if (rules.kl == KlEstimator::kNone) return {0, 0};
  const double gap = token.reference - token.logprob;
  const double d = policy_clamp(gap, -rules.kl_log_limit, rules.kl_log_limit);
  const double inside = d == gap ? 1 : 0;
  PolicyKl kl = {-d, inside};
  if (rules.kl == KlEstimator::kK2) kl = {d * d / 2, -d * inside};
  if (rules.kl == KlEstimator::kK3) {
    const double grown = std::expm1(d);
    kl = {grown - d, -grown * inside};
  }
  if (rules.kl == KlEstimator::kAbs) kl = {d < 0 ? -d : d, d < 0 ? inside : d > 0 ? -inside : 0};
  const double value = policy_clamp(kl.value, -rules.kl_limit, rules.kl_limit);
  return {value, value == kl.value ? kl.slope : 0};
}

// One token's share of the loss, before the row's weight, and what the metrics take of it.
struct PolicyTerm {
  double loss, by_ratio, direct;
  double ratio, importance, kl;
  double log_ratio_slope;  // d (this token's part of the row's sum) / d log p
  bool low, high;          // clipped below or above
  bool focused, dropped;   // not below the entropy's threshold; as too far off the policy
};

TOKCORE_HOST_DEVICE void find_clipped(const PolicyRules& rules, const PolicyToken& token,
                                      PolicyTerm& term) {
  const double* p = rules.parameters;
  bool below = false, above = false;
  if (rules.surrogate == Surrogate::kClip) {
    below = term.ratio < 1 - p[0];
    above = term.ratio > 1 + p[1];
  } else if (rules.surrogate == Surrogate::kCispo) {
    below = term.ratio < p[0];
    above = term.ratio > p[1];
  } else if (rules.surrogate == Surrogate::kGmpo) {
    below = above = term.log_ratio_slope == 0;
  } else if (rules.surrogate == Surrogate::kDppo) {
    const double moved = std::exp(token.logprob) - std::exp(token.old);
    below = moved < -p[0];
    above = moved > p[1];
  }
  term.low = below && token.advantage < 0;
  term.high = above && token.advantage > 0;
}

TOKCORE_HOST_DEVICE PolicyTerm policy_term(const PolicyRules& rules, const PolicyToken& token,
                                           const PolicyRow& row, double entropy_threshold) {
  PolicyTerm term = {};
  const double log_ratio = token.logprob - token.old;
  double ratio_slope = 0;  // d ratio / d log p of this token alone
  term.ratio = row.ratio;
  term.log_ratio_slope = 1;
  if (rules.level == RatioLevel::kToken) {
    const double limited = policy_clamp(log_ratio, -rules.log_ratio_limit, rules.log_ratio_limit);
    term.ratio = std::exp(limited);
    ratio_slope = limited == log_ratio ? term.ratio : 0;
  } else if (rules.level == RatioLevel::kSequenceToken) {
    ratio_slope = row.ratio_slope * (row.tokens > 1 ? row.tokens : 1);
  } else if (rules.surrogate == Surrogate::kGmpo) {
    term.log_ratio_slope = gmpo_log(rules, log_ratio, token.advantage).slope;
  }
  find_clipped(rules, token, term);
  term.focused = !(token.entropy < entropy_threshold);
  term.importance = row.importance * token_importance(rules, token);
  term.dropped = row.off_policy && token.advantage < 0;
  // VESPO has taken it into phi.
  const double importance = rules.surrogate == Surrogate::kVespo ? 1 : term.importance;
  PolicyPart part = {0, 0, 0};
  if (!term.dropped && term.focused && importance != 0)
    part = surrogate_of(rules, token, row, term.ratio);
  // What drops a token's surrogate leaves its KL.
  const PolicyKl kl = kl_estimate(rules, token);
  const double weight = rules.kl_coefficient * (rules.corrected_kl ? term.ratio : 1);
  term.kl = kl.value * (rules.corrected_kl ? term.ratio : 1);
  term.loss = part.value * importance + (weight == 0 ? 0 : weight * kl.value);
  term.by_ratio =
      part.by_ratio * importance + (rules.corrected_kl ? rules.kl_coefficient * kl.value : 0);
  term.direct = part.direct * importance + (weight == 0 ? 0 : weight * kl.slope);
  // A ratio that overflowed has no part in a loss that is clipped.
  if (ratio_slope != 0 && term.by_ratio != 0) term.direct += term.by_ratio * ratio_slope;
  return term;
}

// Sums over tokens and rows, from which loss and metrics follow.
struct PolicyTotals {
  double loss = 0, rows = 0, tokens = 0, kl = 0, entropy = 0, low = 0, high = 0, ratio = 0,
         importance = 0, focused = 0, focused_entropy = 0, off_policy = 0, phi = 0;
  double by_ratio = 0;  // of one row: the loss's derivative by the row's ratio
};
TOKCORE_HOST_DEVICE void add_term(const PolicyRules& rules, const PolicyToken& token,
                                  const PolicyTerm& term, PolicyTotals& totals) {
  totals.tokens += 1;
  totals.kl += term.kl;
  totals.entropy += token.entropy;
  totals.importance += term.importance;
  totals.focused += term.focused;
  totals.off_policy += term.dropped;
  if (term.focused) totals.focused_entropy += token.entropy;
  if (!rules.of_rows()) totals.ratio += term.ratio;
  if (rules.clips_rows()) return;
  totals.low += term.low;
  totals.high += term.high;
}

// What a row adds beside its tokens.
TOKCORE_HOST_DEVICE void add_row(const PolicyRules& rules, const PolicyRow& row, double advantage,
                                 PolicyTotals& totals) {
  totals.rows += row.tokens > 0;
  totals.phi += advantage >= 0 ? row.phi_positive : row.phi_negative;
  if (rules.of_rows()) totals.ratio += row.ratio;
  if (!rules.clips_rows()) return;
  PolicyTerm term = {};
  PolicyToken token = {};
  token.advantage = advantage;
  term.ratio = row.ratio;
  term.log_ratio_slope = 1;
  find_clipped(rules, token, term);
  totals.low += term.low;
  totals.high += term.high;
}

// Loss, and what the saved gradients are still to be multiplied by.
struct PolicyResult {
  double loss, scale, entropy_scale;
};

TOKCORE_HOST_DEVICE PolicyResult policy_result(const PolicyRules& rules, const PolicyTotals& totals,
                                               int64_t rows, const double* normalizer) {
  const double counted = rules.count_empty ? double(rows) : totals.rows;
  double over = 1;
  if (rules.aggregation == Aggregation::kTokenMean) over = totals.tokens;
  if (rules.aggregation == Aggregation::kSeqMeanTokenMean) over = counted;
  if (rules.aggregation == Aggregation::kSeqMeanTokenSum) over = counted;
  if (rules.aggregation == Aggregation::kSeqMeanTokenSumNorm) over = counted * rules.length;
  if (over < 1) over = 1;
  over *= rules.accumulation;
  double entropy_over = (totals.focused > 1 ? totals.focused : 1) * rules.accumulation;
  // A normaliser that was given counts the whole batch, whatever part of it is here.
  if (normalizer != nullptr) {
    over = *normalizer > 0 ? *normalizer : 1;
    if (rules.aggregation == Aggregation::kTokenMean) entropy_over = over;
  }
  if (!(totals.tokens >= 0)) over = totals.tokens;  // NaN: a row whose ends are wrong
  PolicyResult result = {0, 1 / over, -rules.entropy_coefficient / entropy_over};
  result.loss = totals.loss * result.scale;
  if (rules.entropy_coefficient != 0) result.loss += totals.focused_entropy * result.entropy_scale;
  return result;
}

// In the order of the names in tokcore/ops/policy_loss.py.
constexpr int kPolicyMetrics = 10;
TOKCORE_HOST_DEVICE void policy_metrics(const PolicyRules& rules, const PolicyTotals& totals,
                                        int64_t rows, double (&metrics)[kPolicyMetrics]) {
  const double tokens = totals.tokens > 1 ? totals.tokens : 1, all = rows > 1 ? double(rows) : 1;
  const double clips = rules.clips_rows() ? all : tokens;
  metrics[0] = totals.tokens;
  metrics[1] = totals.kl / tokens;
  metrics[2] = totals.entropy / tokens;
  metrics[3] = totals.low / clips;
  metrics[4] = totals.high / clips;
  metrics[5] = totals.ratio / (rules.of_rows() ? all : tokens);
  metrics[6] = totals.importance / tokens;
  metrics[7] = totals.focused / tokens;
  metrics[8] = totals.off_policy / tokens;
  metrics[9] = totals.phi / all;
}

// The tensors of a call, as both devices read them. Row i is [begin(i), end(i)) of the tokens.
template <typename T>
struct PolicyTensors {
  PolicyRules rules;
  int64_t rows, width, tokens;  // width: of a padded row; -1 where rows are packed
  const int64_t* row_ends;      // packed: rows + 1 of them, from 0
  const bool* mask;             // null: every token counts
  const T *logprob, *old, *reference, *sampler, *importance, *advantage, *entropy;
  const double *entropy_threshold, *normalizer;
  T *gradient, *entropy_gradient;  // of the loss, but for PolicyResult's scales; null: not wanted

  TOKCORE_HOST_DEVICE int64_t begin(int64_t row) const {
    return row_ends == nullptr ? row * width : row_ends[row];
  }
  TOKCORE_HOST_DEVICE int64_t end(int64_t row) const {
    return row_ends == nullptr ? (row + 1) * width : row_ends[row + 1];
  }
  TOKCORE_HOST_DEVICE bool kept(int64_t t) const { return mask == nullptr || mask[t]; }
  TOKCORE_HOST_DEVICE double row_advantage(int64_t row) const {
    return rules.row_advantages ? double(advantage[row]) : 0;
  }
  TOKCORE_HOST_DEVICE double row_importance(int64_t row) const {
    return rules.importance == Importance::kRow ? double(importance[row]) : 1;
  }
  TOKCORE_HOST_DEVICE double threshold() const {
    return entropy_threshold == nullptr ? -kPolicyInfinity : *entropy_threshold;
  }
  TOKCORE_HOST_DEVICE PolicyToken token(int64_t row, int64_t t) const {
    PolicyToken token = {};
    token.logprob = logprob[t];
    token.old = old == nullptr ? token.logprob : double(old[t]);
    if (reference != nullptr) token.reference = reference[t];
    if (sampler != nullptr) token.sampler_log_ratio = token.old - sampler[t];
    if (rules.importance == Importance::kToken) token.importance = importance[t];
    token.advantage = advantage[rules.row_advantages ? row : t];
    if (entropy != nullptr) token.entropy = entropy[t];
    return token;
  }
  TOKCORE_HOST_DEVICE void put(int64_t t, double of_logprob, double of_entropy) const {
    if (gradient != nullptr) gradient[t] = T(of_logprob);
    if (entropy_gradient != nullptr) entropy_gradient[t] = T(of_entropy);
  }
};

// First visit of a token.
template <typename T>
TOKCORE_HOST_DEVICE void sum_token(const PolicyTensors<T>& p, int64_t row, int64_t t,
                                   PolicySums& sums) {
  if (p.kept(t)) {
    add_token(p.rules, p.token(row, t), sums);
  } else if (p.rules.trl_padding && p.rules.surrogate == Surrogate::kVespo) {
    sums.vespo += vespo_log(token_importance(p.rules, p.token(row, t)));
  }
}

// Second visit.
template <typename T>
TOKCORE_HOST_DEVICE void visit_token(const PolicyTensors<T>& p, int64_t row, int64_t t,
                                     const PolicyRow& common, double threshold,
                                     PolicyTotals& totals) {
  const bool kept = p.kept(t);
  const bool padding = p.rules.trl_padding && p.rules.aggregation == Aggregation::kSeqMeanTokenSum;
  if (!kept && !padding) {
    p.put(t, 0, 0);
    return;
  }
  const PolicyToken token = p.token(row, t);
  const PolicyTerm term = policy_term(p.rules, token, common, threshold);
  totals.loss += common.weight * term.loss;
  totals.by_ratio += common.weight * term.by_ratio;
  p.put(t, common.weight * term.direct, kept && term.focused ? 1 : 0);
  if (kept) add_term(p.rules, token, term, totals);
}

// Whether a third visit is needed: the ratio is the row's, and every token moves it.
template <typename T>
TOKCORE_HOST_DEVICE bool has_row_gradient(const PolicyTensors<T>& p, const PolicyTotals& totals) {
  const RatioLevel level = p.rules.level;
  return p.gradient != nullptr && totals.by_ratio != 0 &&
         (level == RatioLevel::kSequence || level == RatioLevel::kSequenceSum);
}

template <typename T>
TOKCORE_HOST_DEVICE void add_row_gradient(const PolicyTensors<T>& p, int64_t row, int64_t t,
                                          double of_sum) {
  if (!p.kept(t)) return;
  if (p.rules.surrogate == Surrogate::kGmpo) {
    const PolicyToken token = p.token(row, t);
    of_sum *= gmpo_log(p.rules, token.logprob - token.old, token.advantage).slope;
  }
  p.gradient[t] = T(double(p.gradient[t]) + of_sum);
}

}  // namespace
}  // namespace tokcore
