// The policy losses of the group-relative methods, from per-token log-probabilities: loss, metrics
// and gradient from one call. The arithmetic is common/policy.h.
//
// A block takes a row and leaves its sums behind; one block adds them up, in a fixed order. What is
// known only then (how many tokens there are) multiplies the gradient in the backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/namespace.h"
#include "common/policy_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"

namespace tokcore {
namespace {

template <typename T>
struct PolicyLossParams {
  PolicyTensors<T> in;
  PolicyTotals* of_rows;
  T *loss, *metrics;
  double* scales;
};

// Row ends are followed only where they are what they should be.
template <typename T>
__device__ __forceinline__ bool is_well_formed(const PolicyTensors<T>& in, int64_t row) {
  if (in.row_ends == nullptr) return true;
  const int64_t begin = in.row_ends[row], end = in.row_ends[row + 1];
  return begin >= 0 && begin <= end && end <= in.tokens && (row > 0 || begin == 0) &&
         (row + 1 < in.rows || end == in.tokens);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) policy_loss_kernel(PolicyLossParams<T> p) {
  const PolicyTensors<T>& in = p.in;
  const double threshold = in.threshold();
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    PolicyTotals totals;
    if (!is_well_formed(in, row)) {
      totals.loss = totals.tokens = kPolicyNaN;
      if (threadIdx.x == 0) p.of_rows[row] = totals;
      continue;
    }
    const int64_t begin = in.begin(row), end = in.end(row);
    PolicySums sums;
    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) sum_token(in, row, t, sums);
    const PolicyRow common =
        policy_row(in.rules, block_sum(sums), end - begin, in.row_importance(row));
    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x)
      visit_token(in, row, t, common, threshold, totals);
    totals = block_sum(totals);
    // Each thread adds to what it wrote itself.
    if (has_row_gradient(in, totals))
      for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x)
        add_row_gradient(in, row, t, totals.by_ratio * common.ratio_slope);
    if (threadIdx.x == 0) {
      add_row(in.rules, common, in.row_advantage(row), totals);
      p.of_rows[row] = totals;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) policy_loss_total_kernel(PolicyLossParams<T> p) {
  const PolicyTensors<T>& in = p.in;
  PolicyTotals totals;
  for (int64_t row = threadIdx.x; row < in.rows; row += blockDim.x)
    add_fields(p.of_rows[row], totals);
  totals = block_sum(totals);
  if (threadIdx.x != 0) return;
  if (in.rows == 0 && in.tokens > 0) totals.loss = totals.tokens = kPolicyNaN;  // ends without rows
  const PolicyResult result = policy_result(in.rules, totals, in.rows, in.normalizer);
  double values[kPolicyMetrics];
  policy_metrics(in.rules, totals, in.rows, values);
  *p.loss = T(result.loss);
  for (int i = 0; i < kPolicyMetrics; ++i) p.metrics[i] = T(values[i]);
  p.scales[0] = result.scale;
  p.scales[1] = result.entropy_scale;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) policy_loss_backward_kernel(PolicyScaled<T> p) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < p.logprobs; i += stride) p.put_logprob(i);
  for (int64_t i = first; i < p.entropies; i += stride) p.put_entropy(i);
}

// Threads for rows of about this many tokens: no more than there are.
inline unsigned threads_of_tokens(int64_t tokens) {
  unsigned threads = kWarpThreads;
  while (threads < kMaxThreads && threads < tokens) threads *= 2;
  return threads;
}

PolicyOutputs run_policy_loss(const PolicyCall& call) {
  const Tensor& like = call.logprob;
  const Shape tokens = shape_of(like), none = {0};
  const ScalarType type = like.scalar_type();
  const DeviceGuard guard(device_index(like));
  Tensor loss = allocate_output(like, {}, type);
  Tensor metrics = allocate_output(like, {kPolicyMetrics}, type);
  Tensor gradient = allocate_output(like, call.logprob_needs_grad ? tokens : none, type);
  Tensor entropy_gradient = allocate_output(like, call.entropy_needs_grad ? tokens : none, type);
  Tensor scales = allocate_output(like, {2}, ScalarType::Double);
  Tensor of_rows = allocate_output(like, {call.rows, kFields<PolicyTotals>}, ScalarType::Double);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const PolicyLossParams<T> p = {call.tensors<T>(gradient, entropy_gradient),
                                   static_cast<PolicyTotals*>(of_rows.mutable_data_ptr()),
                                   static_cast<T*>(loss.mutable_data_ptr()),
                                   static_cast<T*>(metrics.mutable_data_ptr()),
                                   static_cast<double*>(scales.mutable_data_ptr())};
    const int64_t per_row = call.rows > 0 ? like.numel() / call.rows : 0;
    launch(dim3(block_count(call.rows)), dim3(threads_of_tokens(per_row)), 0, current_stream(like),
           policy_loss_kernel<T>, p);
    launch(dim3(1), dim3(threads_of_tokens(call.rows)), 0, current_stream(like),
           policy_loss_total_kernel<T>, p);
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {loss, metrics, gradient, entropy_gradient, scales};
}

std::tuple<Tensor, Tensor> policy_loss_backward_cuda(const Tensor& grad_loss,
                                                     const Tensor& /* logprob */,
                                                     const Tensor& logprob_gradient,
                                                     const Tensor& entropy_gradient,
                                                     const Tensor& scales) {
  const PolicyScaling call = checked_scaling(grad_loss, logprob_gradient, entropy_gradient, scales);
  const DeviceGuard guard(device_index(logprob_gradient));
  const ScalarType type = logprob_gradient.scalar_type();
  Tensor logprob = allocate_output(logprob_gradient, shape_of(logprob_gradient), type);
  Tensor entropy = allocate_output(entropy_gradient, shape_of(entropy_gradient), type);
  const int64_t most = std::max(logprob.numel(), entropy.numel());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const unsigned threads = threads_of_tokens(most);
    launch(dim3(block_count((most + threads - 1) / threads)), dim3(threads), 0,
           current_stream(logprob_gradient), policy_loss_backward_kernel<T>,
           call.scaled<T>(logprob, entropy));
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprob, entropy};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("policy_loss", TORCH_BOX(&tokcore::policy_loss_call<tokcore::run_policy_loss>));
  m.impl("policy_loss_backward", TORCH_BOX(&tokcore::policy_loss_backward_cuda));
}
