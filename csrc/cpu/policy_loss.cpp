// The policy losses of the group-relative methods, from per-token log-probabilities: loss, metrics
// and gradient from one call. The arithmetic is common/policy.h, in double; nothing here is worth
// an instruction set of its own, so the rows of the levels are empty.
#if !defined(TOKCORE_ISA)

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/policy_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

// A token costs about as much as this many entries of a vocabulary.
constexpr int64_t kTokenCost = 64;

void check_row_ends(const PolicyCall& call) {
  if (!call.row_ends) return;
  const int64_t* ends = static_cast<const int64_t*>(call.row_ends->const_data_ptr());
  const int64_t tokens = call.logprob.numel();
  for (int64_t row = 0; row <= call.rows; ++row) {
    const bool right = row == 0 ? ends[0] == 0 : ends[row] >= ends[row - 1] && ends[row] <= tokens;
    check(right && (row < call.rows || ends[row] == tokens), "policy_loss",
          "cu_seqlens must rise from 0 to the ", tokens, " packed tokens without falling, got ",
          ends[row], " at ", row);
  }
}

template <typename T>
PolicyTotals run_row(const PolicyTensors<T>& p, int64_t row) {
  const int64_t begin = p.begin(row), end = p.end(row);
  PolicySums sums;
  for (int64_t t = begin; t < end; ++t) sum_token(p, row, t, sums);
  const PolicyRow common = policy_row(p.rules, sums, end - begin, p.row_importance(row));
  const double threshold = p.threshold();
  PolicyTotals totals;
  for (int64_t t = begin; t < end; ++t) visit_token(p, row, t, common, threshold, totals);
  if (has_row_gradient(p, totals))
    for (int64_t t = begin; t < end; ++t)
      add_row_gradient(p, row, t, totals.by_ratio * common.ratio_slope);
  add_row(p.rules, common, p.row_advantage(row), totals);
  return totals;
}

template <typename T>
void run_rows(const PolicyTensors<T>& p, Tensor& loss, Tensor& metrics, Tensor& scales) {
  std::vector<PolicyTotals> of_rows(p.rows);
  const int64_t cost = kTokenCost * (p.tokens / (p.rows > 0 ? p.rows : 1) + 1);
  parallel_units(p.rows, cost, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) of_rows[row] = run_row(p, row);
  });
  PolicyTotals totals;  // in the order of the rows, whoever computed them
  for (const PolicyTotals& row : of_rows) add_fields(row, totals);
  const PolicyResult result = policy_result(p.rules, totals, p.rows, p.normalizer);
  double values[kPolicyMetrics];
  policy_metrics(p.rules, totals, p.rows, values);
  *static_cast<T*>(loss.mutable_data_ptr()) = T(result.loss);
  for (int i = 0; i < kPolicyMetrics; ++i)
    static_cast<T*>(metrics.mutable_data_ptr())[i] = T(values[i]);
  double* scale = static_cast<double*>(scales.mutable_data_ptr());
  scale[0] = result.scale;
  scale[1] = result.entropy_scale;
}

PolicyOutputs run_policy_loss(const PolicyCall& call) {
  check_row_ends(call);
  const Tensor& like = call.logprob;
  const Shape tokens = shape_of(like), none = {0};
  Tensor loss = new_empty(like, {}), metrics = new_empty(like, {kPolicyMetrics});
  Tensor gradient = new_empty(like, call.logprob_needs_grad ? tokens : none);
  Tensor entropy_gradient = new_empty(like, call.entropy_needs_grad ? tokens : none);
  Tensor scales = new_empty(like, {2}, ScalarType::Double);
  if (like.scalar_type() == ScalarType::Double)
    run_rows(call.tensors<double>(gradient, entropy_gradient), loss, metrics, scales);
  else
    run_rows(call.tensors<float>(gradient, entropy_gradient), loss, metrics, scales);
  return {loss, metrics, gradient, entropy_gradient, scales};
}

std::tuple<Tensor, Tensor> policy_loss_backward_cpu(const Tensor& grad_loss,
                                                    const Tensor& /* logprob */,
                                                    const Tensor& logprob_gradient,
                                                    const Tensor& entropy_gradient,
                                                    const Tensor& scales) {
  const PolicyScaling call = checked_scaling(grad_loss, logprob_gradient, entropy_gradient, scales);
  Tensor logprob = new_empty(logprob_gradient, shape_of(logprob_gradient));
  Tensor entropy = new_empty(entropy_gradient, shape_of(entropy_gradient));
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    const PolicyScaled<T> p = call.scaled<T>(logprob, entropy);
    for (int64_t i = 0; i < p.logprobs; ++i) p.put_logprob(i);
    for (int64_t i = 0; i < p.entropies; ++i) p.put_entropy(i);
  };
  logprob.scalar_type() == ScalarType::Double ? fill(double()) : fill(float());
  return {logprob, entropy};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&tokcore::policy_loss_call<tokcore::run_policy_loss>));
  m.impl("policy_loss_backward", TORCH_BOX(&tokcore::policy_loss_backward_cpu));
}

#endif
