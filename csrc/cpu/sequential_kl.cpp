// KL divergences of two rows of logits in either direction, both log-probabilities of a token and
// the policy's entropy, from one read of each tensor; the gradients of all of them from one sweep
// more.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include <cstdint>

#include "common/rows.h"
#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"

namespace tokcore {

constexpr int kForwardKl = 1, kReverseKl = 2;  // bits of `direction`

struct SequentialKlParams {
  Storage storage;
  const void *policy, *reference;
  RowIndex policy_index, reference_index;
  int64_t columns, direction, ignore_index;
  const int64_t* target;         // null: no log-probabilities
  const float* row_temperature;  // null: `temperature`
  double temperature;
  const int64_t* rows;  // those that are read
  void *kl, *reverse_kl, *policy_logprob, *reference_logprob, *entropy, *stats;  // null: not wanted
  void* blocks;  // split rows: one KlState<double> per (listed row, block)
  // backward only; null: absent
  const void *grad_kl, *grad_reverse_kl, *grad_policy_logprob, *grad_reference_logprob,
      *grad_entropy;
  void *policy_gradient, *reference_gradient;
  RowIndex policy_gradient_index, reference_gradient_index;
  double*
      label_gradient;  // (listed rows, 2): formed before the sweep, which may overwrite the logits
  int64_t segment;     // columns of one unit of work
  bool stream;
};

struct SequentialKlRows {
  void (*forward)(const SequentialKlParams&, int64_t begin, int64_t end);  // units: listed rows
  void (*forward_blocks)(const SequentialKlParams&, int64_t begin,
                         int64_t end);  // units: (listed row, block)
  void (*merge_blocks)(const SequentialKlParams&, int64_t begin,
                       int64_t end);  // units: listed rows
  void (*label_gradients)(const SequentialKlParams&, int64_t begin,
                          int64_t end);  // units: listed rows
  void (*backward)(const SequentialKlParams&, int64_t begin,
                   int64_t end);  // units: (listed row, segment)
};
TOKCORE_DECLARE_LEVELS(SequentialKlRows, sequential_kl_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/vocabulary.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

template <typename T>
KlState<double> block_state(const SequentialKlParams& p, int64_t row, int64_t block) {
  const int64_t first = block * kBlockColumns, left = p.columns - first;
  const int64_t n = left < kBlockColumns ? left : kBlockColumns;
  const T* policy = static_cast<const T*>(p.policy) + p.policy_index.offset(row) + first;
  const T* reference = static_cast<const T*>(p.reference) + p.reference_index.offset(row) + first;
  const double scale = scale_of(p, row);
  if (p.direction == kForwardKl)
    return p.entropy ? kl_block<kForwardKl, true>(policy, reference, n, scale)
                     : kl_block<kForwardKl, false>(policy, reference, n, scale);
  if (p.direction == kReverseKl)
    return p.entropy ? kl_block<kReverseKl, true>(policy, reference, n, scale)
                     : kl_block<kReverseKl, false>(policy, reference, n, scale);
  return p.entropy ? kl_block<kForwardKl | kReverseKl, true>(policy, reference, n, scale)
                   : kl_block<kForwardKl | kReverseKl, false>(policy, reference, n, scale);
}

template <typename T>
void finish_row(const SequentialKlParams& p, int64_t row, const KlState<double>& state) {
  using S = Acc<T>;
  const double scale = scale_of(p, row);
  double policy_logsum = log_sum(state.policy), reference_logsum = log_sum(state.reference),
         poison = 0;
  // A row in which either distribution is undefined is undefined as a whole.
  if (policy_logsum != policy_logsum || reference_logsum != reference_logsum)
    policy_logsum = reference_logsum = poison = std::numeric_limits<double>::quiet_NaN();
  const auto put = [&](void* out, double value) {
    if (out) static_cast<S*>(out)[row] = S(value);
  };
  S* stats = static_cast<S*>(p.stats) + 4 * row;
  stats[0] = S(state.policy.max);
  stats[1] = S(policy_logsum);
  stats[2] = S(state.reference.max);
  stats[3] = S(reference_logsum);
  put(p.kl, state.forward + poison);
  put(p.reverse_kl, state.reverse + poison);
  if (p.entropy) put(p.entropy, entropy(state.policy) + poison);
  if (p.target && p.target[row] != p.ignore_index) {
    const T* policy = static_cast<const T*>(p.policy) + p.policy_index.offset(row);
    const T* reference = static_cast<const T*>(p.reference) + p.reference_index.offset(row);
    const int64_t label = p.target[row];
    put(p.policy_logprob,
        (double(to_acc(policy[label])) - state.policy.max) * scale - policy_logsum);
    put(p.reference_logprob,
        (double(to_acc(reference[label])) - state.reference.max) * scale - reference_logsum);
  }
}

template <typename T>
struct SequentialKlOp {
  using State = KlState<double>;
  TOKCORE_INLINE State block(const SequentialKlParams& p, int64_t row, int64_t block) {
    return block_state<T>(p, row, block);
  }
  TOKCORE_INLINE void finish(const SequentialKlParams& p, int64_t row, const State& state) {
    finish_row<T>(p, row, state);
  }
};

// One row's upstream gradients (g_*) and saved values, with p the policy, q the reference, u = log
// p - log q, D = KL(q || p), R = KL(p || q), H the entropy of p:
//   d x_j = p_j (g_D - g_L + g_R (u_j - R) - g_H (log p_j + H)) - g_D q_j + g_L [j = y]
//   d r_j = q_j (g_R - g_M + g_D (-u_j - D))                    - g_R p_j + g_M [j = y]       (M:
//   the reference's log-prob)
// times 1 / T. Factors of p_j = 0 (q_j = 0) may be infinite and are selected away.
struct RowGradient {
  double scale, policy_max, policy_logsum, reference_max, reference_logsum;
  double g_kl = 0, g_reverse = 0, g_policy = 0, g_reference = 0, g_entropy = 0;
  double kl = 0, reverse_kl = 0, entropy = 0;
  double policy_weight = 0,
         reference_weight = 0;  // g_D - g_L and g_R - g_M: exactly 0 for TDPO1's policy
};

template <typename T>
TOKCORE_INLINE RowGradient row_gradient(const SequentialKlParams& p, int64_t row) {
  using S = Acc<T>;
  const auto value = [&](const void* values) {
    return values ? double(static_cast<const S*>(values)[row]) : 0.0;
  };
  const S* stats = static_cast<const S*>(p.stats) + 4 * row;
  RowGradient g = {scale_of(p, row), stats[0], stats[1], stats[2], stats[3]};
  g.g_kl = value(p.grad_kl);
  g.g_reverse = value(p.grad_reverse_kl);
  g.g_policy = value(p.grad_policy_logprob);
  g.g_reference = value(p.grad_reference_logprob);
  g.g_entropy = value(p.grad_entropy);
  g.kl = g.g_kl != 0 ? value(p.kl) : 0;
  g.reverse_kl = g.g_reverse != 0 ? value(p.reverse_kl) : 0;
  g.entropy = g.g_entropy != 0 ? value(p.entropy) : 0;
  g.policy_weight = g.g_kl - g.g_policy;
  g.reference_weight = g.g_reverse - g.g_reference;
  return g;
}

// The label's entries are formed here, in double: read back from a rounded sweep, p - 1 would lose
// its digits.
template <typename T>
void label_gradients(const SequentialKlParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.rows[i];
    if (!p.target || p.target[row] == p.ignore_index) continue;
    const int64_t label = p.target[row];
    const RowGradient g = row_gradient<T>(p, row);
    const double x = to_acc((static_cast<const T*>(p.policy) + p.policy_index.offset(row))[label]);
    const double r =
        to_acc((static_cast<const T*>(p.reference) + p.reference_index.offset(row))[label]);
    const double log_p = (x - g.policy_max) * g.scale - g.policy_logsum;
    const double log_q = (r - g.reference_max) * g.scale - g.reference_logsum;
    const double probability = __builtin_exp(log_p), reference = __builtin_exp(log_q);
    double policy_factor = g.policy_weight, reference_factor = g.reference_weight;
    if (g.g_reverse != 0) policy_factor += g.g_reverse * (log_p - log_q - g.reverse_kl);
    if (g.g_entropy != 0) policy_factor -= g.g_entropy * (log_p + g.entropy);
    if (g.g_kl != 0) reference_factor += g.g_kl * (log_q - log_p - g.kl);
    p.label_gradient[2 * i] = g.scale * ((probability == 0 ? 0 : probability * policy_factor) -
                                         g.g_kl * reference + g.g_policy);
    p.label_gradient[2 * i + 1] = g.scale * ((reference == 0 ? 0 : reference * reference_factor) -
                                             g.g_reverse * probability + g.g_reference);
  }
}

// exp((x - max) / T - logsum) of a vector.
template <typename V>
struct Softmax {
  V max, to_log2, logsum2;
  TOKCORE_INLINE Softmax of(double max, double logsum, double scale) {
    using S = typename V::Scalar;
    return {V::all(S(max)), V::all(S(scale * kLog2E)), V::all(S(logsum * kLog2E))};
  }
  TOKCORE_INLINE V probability(const Softmax& s, V x) {
    return exp2(fma(x - s.max, s.to_log2, V::all(0) - s.logsum2));
  }
};

// The policy's gradient when it is linear in the two distributions (no reverse KL, no entropy): the
// hot case. A distribution with weight 0 is not computed, and its logits, if they are not the
// policy's own, are not read.
template <bool kPolicy, bool kReference, typename T>
TOKCORE_INLINE void linear_gradient(const SequentialKlParams& p, const RowGradient& g, const T* x,
                                    const T* r, T* out, int64_t n) {
  using V = Vec<T>;
  using S = Acc<T>;
  const auto policy = Softmax<V>::of(g.policy_max, g.policy_logsum, g.scale);
  const auto reference = Softmax<V>::of(g.reference_max, g.reference_logsum, g.scale);
  const V policy_weight = V::all(S(g.policy_weight * g.scale)),
          reference_weight = V::all(S(-g.g_kl * g.scale));
  for_each_unit(n, out, p.stream, [&](int64_t j, int64_t left) __attribute__((always_inline)) {
    V xa, xb, ra, rb, da = V::all(0), db = da;
    if (kPolicy) {
      load_unit(x + j, left, xa, xb);
      da = policy_weight * Softmax<V>::probability(policy, xa);
      db = policy_weight * Softmax<V>::probability(policy, xb);
    }
    if (kReference) {
      load_unit(r + j, left, ra, rb);
      da = fma(reference_weight, Softmax<V>::probability(reference, ra), da);
      db = fma(reference_weight, Softmax<V>::probability(reference, rb), db);
    }
    store_unit(out + j, left, p.stream, da, db);
  });
}

template <bool kPolicy, bool kReference, typename T>
TOKCORE_INLINE void general_gradient(const SequentialKlParams& p, const RowGradient& g, const T* x,
                                     const T* r, T* policy_out, T* reference_out, int64_t n) {
  using V = Vec<T>;
  using S = Acc<T>;
  const auto policy = Softmax<V>::of(g.policy_max, g.policy_logsum, g.scale);
  const auto reference = Softmax<V>::of(g.reference_max, g.reference_logsum, g.scale);
  const V natural = V::all(S(g.scale)), gap = V::all(S(g.policy_logsum - g.reference_logsum));
  const V policy_logsum = V::all(S(g.policy_logsum));
  const V g_kl = V::all(S(g.g_kl)), g_reverse = V::all(S(g.g_reverse)),
          g_entropy = V::all(S(g.g_entropy));
  const V kl = V::all(S(g.kl)), reverse_kl = V::all(S(g.reverse_kl)),
          entropy = V::all(S(g.entropy));
  const V policy_weight = V::all(S(g.policy_weight)),
          reference_weight = V::all(S(g.reference_weight));
  // An absent term is left out, not multiplied by 0: its factor may be infinite.
  const bool has_kl = g.g_kl != 0, has_reverse = g.g_reverse != 0, has_entropy = g.g_entropy != 0;
  const auto entry = [&](V xv, V rv, V& dx, V& dr) __attribute__((always_inline)) {
    const V pv = Softmax<V>::probability(policy, xv), qv = Softmax<V>::probability(reference, rv);
    const V from_top = xv - policy.max;
    const V u = (from_top - (rv - reference.max)) * natural - gap;
    if (kPolicy) {
      V factor = policy_weight;
      if (has_reverse) factor = fma(g_reverse, u - reverse_kl, factor);
      if (has_entropy) factor = factor - g_entropy * (from_top * natural - policy_logsum + entropy);
      dx = natural * (positive_only(pv, pv * factor) - g_kl * qv);
    }
    if (kReference) {
      V factor = reference_weight;
      if (has_kl) factor = factor - g_kl * (u + kl);
      dr = natural * (positive_only(qv, qv * factor) - g_reverse * pv);
    }
  };
  T* out = kPolicy ? policy_out : reference_out;
  // Two outputs stream together only when their lines start together.
  const bool stream = p.stream && (!kPolicy || !kReference ||
                                   reinterpret_cast<uintptr_t>(policy_out) % 64 ==
                                       reinterpret_cast<uintptr_t>(reference_out) % 64);
  for_each_unit(n, out, stream, [&](int64_t j, int64_t left) __attribute__((always_inline)) {
    V xa, xb, ra, rb, dxa = V::all(0), dxb = dxa, dra = dxa, drb = dxa;
    load_unit(x + j, left, xa, xb);
    load_unit(r + j, left, ra, rb);
    entry(xa, ra, dxa, dra);
    entry(xb, rb, dxb, drb);
    if (kPolicy) store_unit(policy_out + j, left, stream, dxa, dxb);
    if (kReference) store_unit(reference_out + j, left, stream, dra, drb);
  });
}

template <typename T>
void backward(const SequentialKlParams& p, int64_t begin, int64_t end) {
  const int64_t segments = (p.columns + p.segment - 1) / p.segment;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit / segments, row = p.rows[i], first = unit % segments * p.segment;
    const int64_t n = p.segment < p.columns - first ? p.segment : p.columns - first;
    const RowGradient g = row_gradient<T>(p, row);
    const T* x = static_cast<const T*>(p.policy) + p.policy_index.offset(row) + first;
    const T* r = static_cast<const T*>(p.reference) + p.reference_index.offset(row) + first;
    T* dx = p.policy_gradient
                ? static_cast<T*>(p.policy_gradient) + p.policy_gradient_index.offset(row) + first
                : nullptr;
    T* dr = p.reference_gradient ? static_cast<T*>(p.reference_gradient) +
                                       p.reference_gradient_index.offset(row) + first
                                 : nullptr;
    if (dx && dr)
      general_gradient<true, true>(p, g, x, r, dx, dr, n);
    else if (dr)
      general_gradient<false, true>(p, g, x, r, dx, dr, n);
    else if (g.g_reverse != 0 || g.g_entropy != 0)
      general_gradient<true, false>(p, g, x, r, dx, dr, n);
    else if (g.policy_weight == 0)
      linear_gradient<false, true>(p, g, x, r, dx, n);
    else if (g.g_kl == 0)
      linear_gradient<true, false>(p, g, x, r, dx, n);
    else
      linear_gradient<true, true>(p, g, x, r, dx, n);
    if (p.stream) drain_streams();
    const int64_t column = p.target && p.target[row] != p.ignore_index ? p.target[row] - first : -1;
    if (column < 0 || column >= n) continue;
    if (dx) from_acc(Acc<T>(p.label_gradient[2 * i]), dx + column);
    if (dr) from_acc(Acc<T>(p.label_gradient[2 * i + 1]), dr + column);
  }
}

TOKCORE_BY_STORAGE(forward_any, SequentialKlParams, forward_rows<SequentialKlOp<T>>)
TOKCORE_BY_STORAGE(forward_blocks_any, SequentialKlParams, forward_blocks<SequentialKlOp<T>>)
TOKCORE_BY_STORAGE(merge_blocks_any, SequentialKlParams, merge_blocks<SequentialKlOp<T>>)
TOKCORE_BY_STORAGE(label_gradients_any, SequentialKlParams, label_gradients<T>)
TOKCORE_BY_STORAGE(backward_any, SequentialKlParams, backward<T>)

}  // namespace

extern const SequentialKlRows sequential_kl_rows = {
    forward_any, forward_blocks_any, merge_blocks_any, label_gradients_any, backward_any};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include "common/online_softmax.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_zeros;

struct SequentialKlCall {
  SequentialKlParams params{};
  Tensor policy, reference;
  std::optional<Target> target;
  std::optional<Tensor> mask, row_temperature;
  std::vector<int64_t> kept;  // rows with something to read
  int64_t rows = 0;
};

// Everything that can be wrong is found here, before anything is allocated.
SequentialKlCall check_call(const char* op, const Tensor& policy, const Tensor& reference,
                            const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& row_temperature, double temperature,
                            int64_t ignore_index) {
  check_logits(op, "policy_logits", policy);
  check_pair(op, policy, reference);
  const Shape leading = leading_shape(policy);
  SequentialKlCall call;
  if (target) call.target = check_target(op, *target, "policy_logits", policy, false);
  call.mask = check_rows(op, "mask", mask, "policy_logits", policy, ScalarType::Bool, leading);
  call.row_temperature = check_rows(op, "temperature", row_temperature, "policy_logits", policy,
                                    ScalarType::Float, leading);
  call.rows = count(leading);
  call.kept = kept_rows(op, call.target, call.rows, policy.size(-1), ignore_index,
                        data_or_null<bool>(call.mask));
  call.policy = unit_last_stride(policy);
  call.reference = unit_last_stride(reference);

  SequentialKlParams& p = call.params;
  p.storage = storage_of(policy);
  p.policy = call.policy.const_data_ptr();
  p.reference = call.reference.const_data_ptr();
  p.policy_index = row_index(op, call.policy);
  p.reference_index = row_index(op, call.reference);
  p.columns = policy.size(-1);
  p.ignore_index = ignore_index;
  p.target = call.target ? static_cast<const int64_t*>(call.target->ids.const_data_ptr()) : nullptr;
  p.row_temperature = data_or_null<float>(call.row_temperature);
  p.temperature = temperature;
  p.rows = call.kept.data();
  return call;
}

using SequentialKlOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SequentialKlOutputs sequential_kl_cpu(const Tensor& policy_logits, const Tensor& reference_logits,
                                      const std::optional<Tensor>& target,
                                      const std::optional<Tensor>& mask,
                                      const std::optional<Tensor>& row_temperature,
                                      double temperature, int64_t ignore_index, int64_t direction,
                                      bool with_entropy,
                                      bool /*inplace_backward: read by the autograd formula*/) {
  const char* op = "sequential_kl";
  check(direction >= 1 && direction <= 3, op,
        "direction must be 1 (forward), 2 (reverse) or 3 (both), got ", direction);
  SequentialKlCall call = check_call(op, policy_logits, reference_logits, target, mask,
                                     row_temperature, temperature, ignore_index);
  SequentialKlParams& p = call.params;
  const ScalarType type = statistics_type(policy_logits);
  const Shape leading = leading_shape(policy_logits);
  // Skipped rows are exactly 0; outputs that nobody asked for are empty.
  const auto output = [&](bool wanted, void*& data) {
    Tensor t = new_zeros(policy_logits, wanted ? leading : Shape{0}, type);
    data = wanted ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  Tensor kl = output(direction & kForwardKl, p.kl),
         reverse = output(direction & kReverseKl, p.reverse_kl);
  Tensor policy_logprob = output(target.has_value(), p.policy_logprob);
  Tensor reference_logprob = output(target.has_value(), p.reference_logprob);
  Tensor entropy = output(with_entropy, p.entropy);
  Tensor stats = new_zeros(policy_logits, with_last(leading, 4), type);
  p.stats = stats.mutable_data_ptr();
  p.direction = direction;

  run_forward<KlState<double>>(TOKCORE_CHOSEN(sequential_kl_rows), p,
                               static_cast<int64_t>(call.kept.size()));
  return {kl, reverse, policy_logprob, reference_logprob, entropy, stats};
}

struct SequentialKlUpstream {
  const std::optional<Tensor>&kl, &reverse_kl, &policy_logprob, &reference_logprob, &entropy;
};
struct SequentialKlSaved {
  const Tensor &kl, &reverse_kl, &entropy, &stats;
};

// Fills whichever gradients are asked for; the policy's is the policy logits themselves in place.
std::tuple<Tensor, Tensor> fill_gradients(const char* op, const SequentialKlUpstream& upstream,
                                          const SequentialKlSaved& saved, SequentialKlCall& call,
                                          bool policy_needs_grad, bool reference_needs_grad,
                                          bool inplace) {
  SequentialKlParams& p = call.params;
  const Tensor& policy = call.policy;
  const ScalarType type = statistics_type(policy);
  const Shape leading = leading_shape(policy);
  const auto rows_of = [&](const char* name, const std::optional<Tensor>& t) {
    return check_rows(op, name, t, "policy_logits", policy, type, leading);
  };
  const auto needed = [&](const char* name, const std::optional<Tensor>& upstream_of,
                          const Tensor& t) {
    return rows_of(name, upstream_of ? std::optional(t) : std::nullopt);
  };
  const auto g_kl = rows_of("grad_kl", upstream.kl),
             g_reverse = rows_of("grad_reverse_kl", upstream.reverse_kl);
  const auto g_policy = rows_of("grad_policy_logprob", upstream.policy_logprob);
  const auto g_reference = rows_of("grad_reference_logprob", upstream.reference_logprob);
  const auto g_entropy = rows_of("grad_entropy", upstream.entropy);
  const auto kl = needed("kl", g_kl, saved.kl),
             reverse = needed("reverse_kl", g_reverse, saved.reverse_kl);
  const auto entropy = needed("entropy", g_entropy, saved.entropy);
  const auto stats =
      check_rows(op, "stats", saved.stats, "policy_logits", policy, type, with_last(leading, 4));

  Tensor policy_gradient = inplace             ? policy
                           : policy_needs_grad ? new_gradient(policy)
                                               : torch::stable::new_empty(policy, {0});
  Tensor reference_gradient =
      reference_needs_grad ? new_gradient(policy) : torch::stable::new_empty(policy, {0});
  const LiveRows live =
      live_rows(call.kept, call.rows,
                {{g_kl, 1}, {g_reverse, 1}, {g_policy, 1}, {g_reference, 1}, {g_entropy, 1}});
  std::vector<double> labels(2 * live.live.size());
  const auto saved_data = [](const std::optional<Tensor>& t) {
    return t ? const_cast<void*>(t->const_data_ptr()) : nullptr;
  };
  p.rows = live.live.data();
  p.grad_kl = data_or_null<void>(g_kl);
  p.grad_reverse_kl = data_or_null<void>(g_reverse);
  p.grad_policy_logprob = data_or_null<void>(g_policy);
  p.grad_reference_logprob = data_or_null<void>(g_reference);
  p.grad_entropy = data_or_null<void>(g_entropy);
  p.kl = saved_data(kl);
  p.reverse_kl = saved_data(reverse);
  p.entropy = saved_data(entropy);
  p.stats = saved_data(stats);
  p.label_gradient = labels.data();
  if (policy_needs_grad) {
    p.policy_gradient = policy_gradient.mutable_data_ptr();
    p.policy_gradient_index = row_index(op, policy_gradient);
  }
  if (reference_needs_grad) {
    p.reference_gradient = reference_gradient.mutable_data_ptr();
    p.reference_gradient_index = row_index(op, reference_gradient);
  }
  p.stream = !inplace && worth_streaming(policy);
  if (policy_needs_grad || reference_needs_grad)
    run_backward(TOKCORE_CHOSEN(sequential_kl_rows), p, static_cast<int64_t>(live.live.size()));
  if (policy_needs_grad) zero_rows(policy_gradient, p.policy_gradient_index, live.dead);
  if (reference_needs_grad) zero_rows(reference_gradient, p.reference_gradient_index, live.dead);
  return {policy_gradient, reference_gradient};
}

std::tuple<Tensor, Tensor> sequential_kl_backward_cpu(
    const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_reverse_kl,
    const std::optional<Tensor>& grad_policy_logprob,
    const std::optional<Tensor>& grad_reference_logprob, const std::optional<Tensor>& grad_entropy,
    const Tensor& policy_logits, const Tensor& reference_logits,
    const std::optional<Tensor>& target, const std::optional<Tensor>& mask, const Tensor& kl,
    const Tensor& reverse_kl, const Tensor& entropy, const Tensor& stats,
    const std::optional<Tensor>& row_temperature, double temperature, int64_t ignore_index,
    bool policy_needs_grad, bool reference_needs_grad) {
  const char* op = "sequential_kl_backward";
  SequentialKlCall call = check_call(op, policy_logits, reference_logits, target, mask,
                                     row_temperature, temperature, ignore_index);
  return fill_gradients(
      op, {grad_kl, grad_reverse_kl, grad_policy_logprob, grad_reference_logprob, grad_entropy},
      {kl, reverse_kl, entropy, stats}, call, policy_needs_grad, reference_needs_grad, false);
}

void sequential_kl_backward_inplace_cpu(
    const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_reverse_kl,
    const std::optional<Tensor>& grad_policy_logprob,
    const std::optional<Tensor>& grad_reference_logprob, const std::optional<Tensor>& grad_entropy,
    Tensor& policy_logits, const Tensor& reference_logits, const std::optional<Tensor>& target,
    const std::optional<Tensor>& mask, const Tensor& kl, const Tensor& reverse_kl,
    const Tensor& entropy, const Tensor& stats, const std::optional<Tensor>& row_temperature,
    double temperature, int64_t ignore_index) {
  const char* op = "sequential_kl_backward_";
  SequentialKlCall call = check_call(op, policy_logits, reference_logits, target, mask,
                                     row_temperature, temperature, ignore_index);
  check_overwritable(op, "policy_logits", policy_logits);
  fill_gradients(
      op, {grad_kl, grad_reverse_kl, grad_policy_logprob, grad_reference_logprob, grad_entropy},
      {kl, reverse_kl, entropy, stats}, call, true, false, true);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("sequential_kl", TORCH_BOX(&tokcore::sequential_kl_cpu));
  m.impl("sequential_kl_backward", TORCH_BOX(&tokcore::sequential_kl_backward_cpu));
  m.impl("sequential_kl_backward_", TORCH_BOX(&tokcore::sequential_kl_backward_inplace_cpu));
}

#endif
