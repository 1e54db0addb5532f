// KL divergences of two rows of logits in either direction, both log-probabilities of a token and
// the policy's entropy, from one read of each tensor; the gradients of all of them from one sweep
// more.
//
// A block takes a row of both tensors. Divergences are summed in the form of
// common/online_softmax.h, in which nothing of the size of a logit is subtracted from its like. The
// forward leaves (maximum, log-sum) of both distributions behind.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "common/namespace.h"
#include "common/rows.h"
#include "cuda/launch.h"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/divergence.cuh"
#include "cuda/primitives/vocabulary.cuh"

namespace tokcore {
namespace {

// What both passes know of their input.
template <typename T>
struct SequentialKlInput {
  const T *policy, *reference;
  RowIndex policy_rows, reference_rows;
  int64_t rows, vocabulary, ignore_index;
  const int64_t* target;         // null: no log-probabilities
  const bool* mask;              // null: every row is kept
  const float* row_temperature;  // null: `scale` is 1 / T of every row
  Acc<T> scale;

  // Every thread reads the label of its row, so that a block agrees without a barrier.
  __device__ __forceinline__ bool is_kept(int64_t row) const {
    return (mask == nullptr || mask[row]) && (target == nullptr || target[row] != ignore_index);
  }
  __device__ __forceinline__ bool is_valid(int64_t row) const {
    return target == nullptr || (target[row] >= 0 && target[row] < vocabulary);
  }
};

// What the forward leaves behind, in the order of the tensor's last dimension.
template <typename acc_t>
struct SequentialKlStats {
  acc_t policy_max, policy_logsum, reference_max, reference_logsum;
};

template <typename T>
struct SequentialKlForward {
  SequentialKlInput<T> in;
  Acc<T>*kl, *reverse_kl, *policy_logprob, *reference_logprob, *entropy;  // null: not wanted
  SequentialKlStats<Acc<T>>* stats;
};

template <typename T>
struct SequentialKlBackward {
  SequentialKlInput<T> in;
  // Null where the gradient is absent.
  const Acc<T>*grad_kl, *grad_reverse_kl, *grad_policy_logprob, *grad_reference_logprob;
  const Acc<T>*grad_entropy, *kl, *reverse_kl, *entropy;
  const SequentialKlStats<Acc<T>>* stats;
  T *policy_gradient, *reference_gradient;  // the policy's may be the policy logits
  RowIndex policy_gradient_rows, reference_gradient_rows;
};

template <int kDirections, bool kEntropy, typename T>
__device__ __forceinline__ KlState<Acc<T>> sweep_rows(const T* policy, const T* reference,
                                                      int64_t size, Acc<T> scale) {
  KlState<Acc<T>> state;
  const Columns columns = fixed_columns<T>();
  constexpr int kPacks = kForwardEntries<T> / Pack<T>::kSize;
  for (int64_t column = columns.first; column < size; column += kPacks * columns.stride) {
    Acc<T> x[kForwardEntries<T>], r[kForwardEntries<T>];
    load_tile(policy, column, columns.stride, size, x);
    load_tile(reference, column, columns.stride, size, r);
    state = merge(state, kl_tile<kDirections, kEntropy>(x, r, scale), scale);
  }
  // What nobody asked for is known to be 0 here, so the loop above does not compute it.
  if (!(kDirections & kForwardKl)) state.forward = 0;
  if (!(kDirections & kReverseKl)) state.reverse = 0;
  if (!kEntropy) state.policy.weighted = 0;
  state.reference.weighted = 0;
  return block_merge(state, scale);
}

// Every output of a row that has no statistics.
template <typename T>
__device__ __forceinline__ void put_row(const SequentialKlForward<T>& p, int64_t row, Acc<T> v) {
  if (p.kl != nullptr) p.kl[row] = v;
  if (p.reverse_kl != nullptr) p.reverse_kl[row] = v;
  if (p.policy_logprob != nullptr) p.policy_logprob[row] = p.reference_logprob[row] = v;
  if (p.entropy != nullptr) p.entropy[row] = v;
  p.stats[row] = {v, v, v, v};
}

template <typename T, int kDirections, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    sequential_kl_kernel(SequentialKlForward<T> p) {
  const SequentialKlInput<T>& in = p.in;
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    if (!in.is_kept(row) || !in.is_valid(row)) {
      if (threadIdx.x == 0) put_row(p, row, in.is_kept(row) ? kNaN<Acc<T>> : Acc<T>(0));
      continue;
    }
    const T* policy = in.policy + in.policy_rows.offset(row);
    const T* reference = in.reference + in.reference_rows.offset(row);
    const Acc<T> scale = scale_of(in.row_temperature, in.scale, row);
    const KlState<Acc<T>> state =
        sweep_rows<kDirections, kEntropy>(policy, reference, in.vocabulary, scale);
    if (threadIdx.x != 0) continue;
    const Distribution<Acc<T>> p_of = {state.policy.max, log_sum(state.policy), scale};
    const Distribution<Acc<T>> q_of = {state.reference.max, log_sum(state.reference), scale};
    // A row in which either distribution is undefined is undefined as a whole.
    if (std::isnan(p_of.logsum + q_of.logsum)) {
      put_row(p, row, kNaN<Acc<T>>);
      continue;
    }
    p.stats[row] = {p_of.max, p_of.logsum, q_of.max, q_of.logsum};
    if (kDirections & kForwardKl) p.kl[row] = state.forward;
    if (kDirections & kReverseKl) p.reverse_kl[row] = state.reverse;
    if (kEntropy) p.entropy[row] = entropy(state.policy);
    if (in.target != nullptr) {
      p.policy_logprob[row] = p_of.log_probability(Acc<T>(policy[in.target[row]]));
      p.reference_logprob[row] = q_of.log_probability(Acc<T>(reference[in.target[row]]));
    }
  }
}

// The gradients of one row, with p the policy, q the reference, u = log p - log q, D = KL(q || p),
// R = KL(p || q), H the entropy of p, y the label, L = log p_y, M = log q_y:
//   dx_j = p_j (g_D - g_L + g_R (u_j - R) - g_H (log p_j + H)) - g_D q_j + g_L [j = y]
//   dr_j = q_j (g_R - g_M - g_D (u_j + D))                     - g_R p_j + g_M [j = y]
// times 1 / T. What the upstream gradients make unnecessary is not read: TDPO1 has g_D = g_L, and
// no term in p_j.
template <typename acc_t>
struct SequentialKlRow {
  Distribution<acc_t> policy, reference;
  acc_t kl, reverse_kl, policy_logprob, reference_logprob, entropy;  // upstream gradients
  acc_t policy_weight, reference_weight;  // the parts of the brackets that no entry changes
  bool policy_is_read, reference_is_read;

  struct Entry {
    acc_t policy, reference;
  };
  template <bool kPolicyRead, bool kReferenceRead>
  __device__ __forceinline__ Entry at(acc_t x, acc_t r) const {
    Entry d = {0, 0};
    // An infinite logarithm may meet a probability or a gradient of 0.
    const acc_t gap = policy.logsum - reference.logsum;
    const acc_t u = ((x - policy.max) - (r - reference.max)) * policy.scale - gap;
    const acc_t log_ratio =
        kPolicyRead && kReferenceRead ? min(max(u, acc_t(-kHuge)), acc_t(kHuge)) : acc_t(0);
    if (kPolicyRead) {
      const acc_t log_p = policy.log_probability(x), p = probability(log_p);
      d.policy +=
          p * (policy_weight + reverse_kl * log_ratio - entropy * max(log_p, acc_t(-kHuge)));
      d.reference -= p * reverse_kl;
    }
    if (kReferenceRead) {
      const acc_t q = probability(reference.log_probability(r));
      d.policy -= q * kl;
      d.reference += q * (reference_weight - kl * log_ratio);
    }
    return d;
  }
};

template <typename T, bool kPolicy, bool kReference>
__device__ __forceinline__ SequentialKlRow<Acc<T>> gradient_of(const SequentialKlBackward<T>& p,
                                                               int64_t row) {
  using acc_t = Acc<T>;
  const acc_t scale = scale_of(p.in.row_temperature, p.in.scale, row);
  const SequentialKlStats<acc_t> stats = p.stats[row];
  SequentialKlRow<acc_t> g;
  g.policy = {stats.policy_max, stats.policy_logsum, scale};
  g.reference = {stats.reference_max, stats.reference_logsum, scale};
  g.kl = value_or_zero(p.grad_kl, row);
  g.reverse_kl = value_or_zero(p.grad_reverse_kl, row);
  g.policy_logprob = value_or_zero(p.grad_policy_logprob, row);
  g.reference_logprob = value_or_zero(p.grad_reference_logprob, row);
  g.entropy = value_or_zero(p.grad_entropy, row);
  const bool has_kl = g.kl != 0, has_reverse = g.reverse_kl != 0, has_entropy = g.entropy != 0;
  const acc_t linear_policy = g.kl - g.policy_logprob;
  const acc_t linear_reference = g.reverse_kl - g.reference_logprob;
  // A saved value may be infinite where its gradient is 0.
  g.policy_weight = linear_policy - (has_reverse ? g.reverse_kl * p.reverse_kl[row] : acc_t(0)) -
                    (has_entropy ? g.entropy * p.entropy[row] : acc_t(0));
  g.reference_weight = linear_reference - (kReference && has_kl ? g.kl * p.kl[row] : acc_t(0));
  g.policy_is_read = (kPolicy && (linear_policy != 0 || has_reverse || has_entropy)) ||
                     (kReference && (has_kl || has_reverse));
  g.reference_is_read = (kPolicy && (has_kl || has_reverse)) ||
                        (kReference && (linear_reference != 0 || has_kl || has_reverse));
  return g;
}

template <bool kPolicyRead, bool kReferenceRead, bool kPolicy, bool kReference, typename T>
__device__ __forceinline__ void sweep_gradients(const SequentialKlRow<Acc<T>>& g, const T* policy,
                                                const T* reference, T* dx, T* dr, int64_t size) {
  constexpr int n = kBackwardEntries<T>, kPacks = n / Pack<T>::kSize;
  const Columns columns = aligned_columns(kPolicy ? dx : dr);
  for (int64_t column = columns.first; column < size; column += kPacks * columns.stride) {
    Acc<T> x[n] = {}, r[n] = {};
    if (kPolicyRead) load_tile(policy, column, columns.stride, size, x);
    if (kReferenceRead) load_tile(reference, column, columns.stride, size, r);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const auto d = g.template at<kPolicyRead, kReferenceRead>(x[i], r[i]);
      x[i] = g.policy.scale * d.policy;
      r[i] = g.policy.scale * d.reference;
    }
    if (kPolicy) store_tile(dx, column, columns.stride, size, x);
    if (kReference) store_tile(dr, column, columns.stride, size, r);
  }
}

template <typename T, bool kPolicy, bool kReference>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    sequential_kl_backward_kernel(SequentialKlBackward<T> p) {
  const SequentialKlInput<T>& in = p.in;
  const int64_t size = in.vocabulary;
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    T* dx = kPolicy ? p.policy_gradient + p.policy_gradient_rows.offset(row) : nullptr;
    T* dr = kReference ? p.reference_gradient + p.reference_gradient_rows.offset(row) : nullptr;
    const auto g = gradient_of<T, kPolicy, kReference>(p, row);
    const bool is_live = in.is_kept(row) && (g.policy_is_read || g.reference_is_read);
    if (!is_live || !in.is_valid(row)) {
      const Acc<T> value = is_live ? kNaN<Acc<T>> : Acc<T>(0);
      if (kPolicy) fill_row(dx, size, value);
      if (kReference) fill_row(dr, size, value);
      continue;
    }
    const T* policy = in.policy + in.policy_rows.offset(row);
    const T* reference = in.reference + in.reference_rows.offset(row);
    const bool at_label = in.target != nullptr && threadIdx.x == 0;
    // The entries at the label are formed apart, before they are rounded.
    typename SequentialKlRow<Acc<T>>::Entry label = {0, 0};
    if (at_label) {
      label = g.template at<true, true>(Acc<T>(policy[in.target[row]]),
                                        Acc<T>(reference[in.target[row]]));
      label.policy += g.policy_logprob;
      label.reference += g.reference_logprob;
    }
    // `dx` may be the policy logits, of which the entry at the label has been read now.
    __syncthreads();
    if (!g.policy_is_read) {
      sweep_gradients<false, true, kPolicy, kReference>(g, policy, reference, dx, dr, size);
    } else if (!g.reference_is_read) {
      sweep_gradients<true, false, kPolicy, kReference>(g, policy, reference, dx, dr, size);
    } else {
      sweep_gradients<true, true, kPolicy, kReference>(g, policy, reference, dx, dr, size);
    }
    // The sweep wrote the entries at the label too, and maybe not by this thread.
    __syncthreads();
    if (at_label && kPolicy) dx[in.target[row]] = T(g.policy.scale * label.policy);
    if (at_label && kReference) dr[in.target[row]] = T(g.policy.scale * label.reference);
  }
}

using Maybe = const std::optional<Tensor>&;  // an argument of a schema that may be None

// What the operators of this file are called with, checked before anything is allocated.
struct SequentialKlCall {
  const char* op;
  Tensor policy, reference;
  std::optional<Tensor> target = {}, mask = {}, row_temperature = {};
  double temperature = 1;
  int64_t ignore_index = 0;
  Shape rows = {};

  template <typename T>
  SequentialKlInput<T> input() const {
    return {static_cast<const T*>(policy.const_data_ptr()),
            static_cast<const T*>(reference.const_data_ptr()),
            row_index(op, policy),
            row_index(op, reference),
            count(rows),
            policy.size(-1),
            ignore_index,
            data_or_null<int64_t>(target),
            data_or_null<bool>(mask),
            data_or_null<float>(row_temperature),
            Acc<T>(1 / temperature)};
  }
  template <typename T, typename Params>
  void launch_rows(void (*kernel)(Params), const Params& params) const {
    launch(dim3(block_count(params.in.rows)), dim3(threads_of_row<T>(params.in.vocabulary)), 0,
           current_stream(policy), kernel, params);
  }
};

SequentialKlCall checked_call(const char* op, const Tensor& policy, const Tensor& reference,
                              Maybe target, Maybe mask, Maybe row_temperature, double temperature,
                              int64_t ignore_index) {
  check_logits(op, "policy_logits", policy);
  check_pair(op, policy, reference);
  SequentialKlCall call = {op, unit_last_stride(policy), unit_last_stride(reference)};
  call.rows = leading_shape(policy);
  if (target) call.target = check_target(op, *target, "policy_logits", policy, false).ids;
  call.mask = check_rows(op, "mask", mask, "policy_logits", policy, ScalarType::Bool, call.rows);
  call.row_temperature = check_rows(op, "temperature", row_temperature, "policy_logits", policy,
                                    ScalarType::Float, call.rows);
  call.temperature = temperature;
  call.ignore_index = ignore_index;
  return call;
}

using SequentialKlOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SequentialKlOutputs sequential_kl_cuda(const Tensor& policy_logits, const Tensor& reference_logits,
                                       Maybe target, Maybe mask, Maybe row_temperature,
                                       double temperature, int64_t ignore_index, int64_t direction,
                                       bool with_entropy, bool /* autograd's inplace_backward */) {
  const char* op = "sequential_kl";
  check(direction >= 1 && direction <= 3, op,
        "direction must be 1 (forward), 2 (reverse) or 3 (both), got ", direction);
  const SequentialKlCall call = checked_call(op, policy_logits, reference_logits, target, mask,
                                             row_temperature, temperature, ignore_index);
  const DeviceGuard guard(device_index(policy_logits));
  const ScalarType type = statistics_type(policy_logits);
  const bool with_target = target.has_value();
  const auto per_row = [&](bool wanted) {
    return allocate_output(policy_logits, wanted ? call.rows : Shape{0}, type);
  };
  Tensor kl = per_row(direction & kForwardKl), reverse_kl = per_row(direction & kReverseKl);
  Tensor policy_logprob = per_row(with_target), reference_logprob = per_row(with_target);
  Tensor entropy = per_row(with_entropy);
  Tensor stats = allocate_output(policy_logits, with_last(call.rows, 4), type);
  dispatch_logits(policy_logits.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const auto data = [](bool wanted, Tensor& t) {
      return wanted ? static_cast<Acc<T>*>(t.mutable_data_ptr()) : nullptr;
    };
    const SequentialKlForward<T> p = {
        call.input<T>(),
        data(direction & kForwardKl, kl),
        data(direction & kReverseKl, reverse_kl),
        data(with_target, policy_logprob),
        data(with_target, reference_logprob),
        data(with_entropy, entropy),
        static_cast<SequentialKlStats<Acc<T>>*>(stats.mutable_data_ptr())};
    const auto launch_directions = [&](auto directions) {
      dispatch_bool(with_entropy, [&](auto entropy) {
        call.launch_rows<T>(
            sequential_kl_kernel<T, decltype(directions)::value, decltype(entropy)::value>, p);
      });
    };
    if (direction == kForwardKl) return launch_directions(Constant<kForwardKl>());
    if (direction == kReverseKl) return launch_directions(Constant<kReverseKl>());
    launch_directions(Constant<kForwardKl | kReverseKl>());
  });
  return {kl, reverse_kl, policy_logprob, reference_logprob, entropy, stats};
}

// The gradients that come in, and what the forward saved.
struct SequentialKlSaved {
  Maybe grad_kl, grad_reverse_kl, grad_policy_logprob, grad_reference_logprob, grad_entropy;
  const Tensor &kl, &reverse_kl, &entropy, &stats;
};

std::tuple<Tensor, Tensor> launch_backward(const SequentialKlCall& call,
                                           const SequentialKlSaved& saved, bool policy_needs_grad,
                                           bool reference_needs_grad, bool inplace) {
  const Tensor& policy = call.policy;
  const ScalarType type = statistics_type(policy);
  const auto rows_of = [&](const char* name, Maybe t) {
    return check_rows(call.op, name, t, "policy_logits", policy, type, call.rows);
  };
  const auto saved_of = [&](const char* name, Maybe gradient, const Tensor& t) {
    return gradient ? rows_of(name, t) : std::nullopt;
  };
  const auto grad_kl = rows_of("grad_kl", saved.grad_kl);
  const auto grad_reverse_kl = rows_of("grad_reverse_kl", saved.grad_reverse_kl);
  const auto grad_policy_logprob = rows_of("grad_policy_logprob", saved.grad_policy_logprob);
  const auto grad_reference_logprob =
      rows_of("grad_reference_logprob", saved.grad_reference_logprob);
  const auto grad_entropy = rows_of("grad_entropy", saved.grad_entropy);
  const auto kl = saved_of("kl", grad_kl, saved.kl);
  const auto reverse_kl = saved_of("reverse_kl", grad_reverse_kl, saved.reverse_kl);
  const auto entropy = saved_of("entropy", grad_entropy, saved.entropy);
  const auto stats = check_rows(call.op, "stats", saved.stats, "policy_logits", policy, type,
                                with_last(call.rows, 4));
  const DeviceGuard guard(device_index(policy));
  const auto gradient = [&](bool wanted) {
    return allocate_output(policy, wanted ? shape_of(policy) : Shape{0}, policy.scalar_type());
  };
  Tensor dx = inplace ? policy : gradient(policy_needs_grad), dr = gradient(reference_needs_grad);
  dispatch_logits(policy.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const SequentialKlBackward<T> p = {call.input<T>(),
                                       data_or_null<Acc<T>>(grad_kl),
                                       data_or_null<Acc<T>>(grad_reverse_kl),
                                       data_or_null<Acc<T>>(grad_policy_logprob),
                                       data_or_null<Acc<T>>(grad_reference_logprob),
                                       data_or_null<Acc<T>>(grad_entropy),
                                       data_or_null<Acc<T>>(kl),
                                       data_or_null<Acc<T>>(reverse_kl),
                                       data_or_null<Acc<T>>(entropy),
                                       data_or_null<SequentialKlStats<Acc<T>>>(stats),
                                       static_cast<T*>(dx.mutable_data_ptr()),
                                       static_cast<T*>(dr.mutable_data_ptr()),
                                       row_index(call.op, dx),
                                       row_index(call.op, dr)};
    if (policy_needs_grad && reference_needs_grad)
      return call.launch_rows<T>(sequential_kl_backward_kernel<T, true, true>, p);
    if (policy_needs_grad)
      return call.launch_rows<T>(sequential_kl_backward_kernel<T, true, false>, p);
    if (reference_needs_grad) call.launch_rows<T>(sequential_kl_backward_kernel<T, false, true>, p);
  });
  return {dx, dr};
}

std::tuple<Tensor, Tensor> sequential_kl_backward_cuda(
    Maybe grad_kl, Maybe grad_reverse_kl, Maybe grad_policy_logprob, Maybe grad_reference_logprob,
    Maybe grad_entropy, const Tensor& policy_logits, const Tensor& reference_logits, Maybe target,
    Maybe mask, const Tensor& kl, const Tensor& reverse_kl, const Tensor& entropy,
    const Tensor& stats, Maybe row_temperature, double temperature, int64_t ignore_index,
    bool policy_needs_grad, bool reference_needs_grad) {
  const SequentialKlCall call =
      checked_call("sequential_kl_backward", policy_logits, reference_logits, target, mask,
                   row_temperature, temperature, ignore_index);
  return launch_backward(call,
                         {grad_kl, grad_reverse_kl, grad_policy_logprob, grad_reference_logprob,
                          grad_entropy, kl, reverse_kl, entropy, stats},
                         policy_needs_grad, reference_needs_grad, false);
}

void sequential_kl_backward_inplace_cuda(
    Maybe grad_kl, Maybe grad_reverse_kl, Maybe grad_policy_logprob, Maybe grad_reference_logprob,
    Maybe grad_entropy, Tensor& policy_logits, const Tensor& reference_logits, Maybe target,
    Maybe mask, const Tensor& kl, const Tensor& reverse_kl, const Tensor& entropy,
    const Tensor& stats, Maybe row_temperature, double temperature, int64_t ignore_index) {
  const SequentialKlCall call =
      checked_call("sequential_kl_backward_", policy_logits, reference_logits, target, mask,
                   row_temperature, temperature, ignore_index);
  check_overwritable(call.op, "policy_logits", policy_logits);
  launch_backward(call,
                  {grad_kl, grad_reverse_kl, grad_policy_logprob, grad_reference_logprob,
                   grad_entropy, kl, reverse_kl, entropy, stats},
                  true, false, true);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("sequential_kl", TORCH_BOX(&tokcore::sequential_kl_cuda));
  m.impl("sequential_kl_backward", TORCH_BOX(&tokcore::sequential_kl_backward_cuda));
  m.impl("sequential_kl_backward_", TORCH_BOX(&tokcore::sequential_kl_backward_inplace_cuda));
}
