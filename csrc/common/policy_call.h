// The call of policy_loss and of its backward, as both devices take it: the arguments are checked
// and laid out here, before anything is allocated, and what is left is a loop over rows.
#pragma once

#include <tuple>

#include "common/check.h"
#include "common/policy.h"

namespace tokcore {
namespace {

using OptionalTensor = std::optional<Tensor>;

// (loss, metrics, logprob_gradient, entropy_gradient, scales)
using PolicyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct PolicyCall {
  PolicyRules rules{};
  Tensor logprob;
  OptionalTensor entropy, advantage, old, reference, sampler, importance, mask, row_ends;
  OptionalTensor entropy_threshold, normalizer;
  int64_t rows = 0, width = -1;
  bool logprob_needs_grad = false, entropy_needs_grad = false;

  template <typename T>
  PolicyTensors<T> tensors(Tensor& gradient, Tensor& entropy_gradient) const {
    PolicyTensors<T> p = {};
    p.rules = rules;
    p.rows = rows;
    p.width = width;
    p.tokens = logprob.numel();
    p.row_ends = data_or_null<int64_t>(row_ends);
    p.mask = data_or_null<bool>(mask);
    p.logprob = static_cast<const T*>(logprob.const_data_ptr());
    p.old = data_or_null<T>(old);
    p.reference = data_or_null<T>(reference);
    p.sampler = data_or_null<T>(sampler);
    p.importance = data_or_null<T>(importance);
    p.advantage = data_or_null<T>(advantage);
    p.entropy = data_or_null<T>(entropy);
    p.entropy_threshold = data_or_null<double>(entropy_threshold);
    p.normalizer = data_or_null<double>(normalizer);
    if (logprob_needs_grad) p.gradient = static_cast<T*>(gradient.mutable_data_ptr());
    if (entropy_needs_grad)
      p.entropy_gradient = static_cast<T*>(entropy_gradient.mutable_data_ptr());
    return p;
  }
};

// The operator `policy_loss`; `run` is a device's loop.
template <PolicyOutputs (*run)(const PolicyCall&)>
PolicyOutputs policy_loss_call(
    const Tensor& logprob, const Tensor& advantage, const OptionalTensor& old_logprob,
    const OptionalTensor& reference_logprob, const OptionalTensor& sampler_logprob,
    const OptionalTensor& importance, const OptionalTensor& entropy, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, const OptionalTensor& entropy_threshold,
    const OptionalTensor& normalizer, int64_t surrogate, int64_t level, int64_t kl,
    int64_t aggregation, int64_t importance_rule, bool mask_importance, bool row_advantages,
    bool corrected_kl, bool count_empty, bool trl_padding, double parameter0, double parameter1,
    double parameter2, double parameter3, double log_ratio_limit, double kl_coefficient,
    double kl_log_limit, double kl_limit, double off_policy_threshold, double least_importance,
    double most_importance, double entropy_coefficient, double accumulation, double length,
    bool logprob_needs_grad, bool entropy_needs_grad) {
  const char* op = "policy_loss";
  const ScalarType type = logprob.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, op,
        "logprob must be float32 or float64, got ", toString(type));
  const bool packed = cu_seqlens.has_value();
  check(logprob.dim() == (packed ? 1 : 2), op, "logprob must have shape ",
        packed ? "(total,) with cu_seqlens" : "(B, T)", ", got ", to_text(shape_of(logprob)));
  const Shape tokens = shape_of(logprob);
  const auto rows_of = [&](const char* name, const OptionalTensor& t, ScalarType dtype,
                           const Shape& shape) {
    return check_rows(op, name, t, "logprob", logprob, dtype, shape);
  };
  PolicyCall call;
  if (packed) {
    check(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1, op,
          "cu_seqlens must have shape (B + 1,), got ", to_text(shape_of(*cu_seqlens)));
    call.row_ends = rows_of("cu_seqlens", cu_seqlens, ScalarType::Long, shape_of(*cu_seqlens));
    call.rows = cu_seqlens->numel() - 1;
  } else {
    call.rows = tokens[0];
    call.width = tokens[1];
  }
  const Shape one_a_row = {call.rows};
  const auto rule = static_cast<Importance>(importance_rule);
  call.rules = {static_cast<Surrogate>(surrogate),
                static_cast<RatioLevel>(level),
                static_cast<KlEstimator>(kl),
                static_cast<Aggregation>(aggregation),
                rule,
                mask_importance,
                row_advantages,
                corrected_kl,
                count_empty,
                trl_padding,
                {parameter0, parameter1, parameter2, parameter3},
                log_ratio_limit,
                kl_coefficient,
                kl_log_limit,
                kl_limit,
                off_policy_threshold,
                least_importance,
                most_importance,
                entropy_coefficient,
                accumulation,
                length};
  call.logprob = torch::stable::contiguous(logprob);
  call.advantage = rows_of("advantages", advantage, type, row_advantages ? one_a_row : tokens);
  call.old = rows_of("old_logprob", old_logprob, type, tokens);
  call.reference = rows_of("reference_logprob", reference_logprob, type, tokens);
  call.sampler = rows_of("sampler_logprob", sampler_logprob, type, tokens);
  call.importance =
      rows_of("importance_ratio", importance, type, rule == Importance::kRow ? one_a_row : tokens);
  call.entropy = rows_of("entropy", entropy, type, tokens);
  call.mask = rows_of("mask", mask, ScalarType::Bool, tokens);
  call.entropy_threshold = rows_of("entropy_threshold", entropy_threshold, ScalarType::Double, {});
  call.normalizer = rows_of("normalizer", normalizer, ScalarType::Double, {});
  call.logprob_needs_grad = logprob_needs_grad;
  call.entropy_needs_grad = entropy_needs_grad;
  const auto needs = [&](bool needed, const char* name, const OptionalTensor& t) {
    check(!needed || t.has_value(), op, name, " is needed by these rules, got none");
  };
  needs(call.rules.kl != KlEstimator::kNone, "reference_logprob", call.reference);
  needs(rule == Importance::kTokenComputed || rule == Importance::kRowComputed, "sampler_logprob",
        call.sampler);
  needs(rule == Importance::kToken || rule == Importance::kRow, "importance_ratio",
        call.importance);
  needs(entropy_coefficient != 0 || entropy_needs_grad, "entropy", call.entropy);
  return run(call);
}

// The backward multiplies the gradients that the forward left by what was known only at its end.
template <typename T>
struct PolicyScaled {
  const T *grad_loss, *logprob_gradient, *entropy_gradient;
  const double* scales;
  T *logprob, *entropy;
  int64_t logprobs, entropies;

  // A loss that nobody differentiates has no gradient, whatever stands there.
  TOKCORE_HOST_DEVICE T times(T gradient, double scale) const {
    return *grad_loss == 0 ? T(0) : T(gradient * (double(*grad_loss) * scale));
  }
  TOKCORE_HOST_DEVICE void put_logprob(int64_t i) const {
    logprob[i] = times(logprob_gradient[i], scales[0]);
  }
  TOKCORE_HOST_DEVICE void put_entropy(int64_t i) const {
    entropy[i] = times(entropy_gradient[i], scales[1]);
  }
};

struct PolicyScaling {
  OptionalTensor grad_loss, logprob_gradient, entropy_gradient, scales;

  template <typename T>
  PolicyScaled<T> scaled(Tensor& logprob, Tensor& entropy) const {
    return {data_or_null<T>(grad_loss),
            data_or_null<T>(logprob_gradient),
            data_or_null<T>(entropy_gradient),
            data_or_null<double>(scales),
            static_cast<T*>(logprob.mutable_data_ptr()),
            static_cast<T*>(entropy.mutable_data_ptr()),
            logprob.numel(),
            entropy.numel()};
  }
};

inline PolicyScaling checked_scaling(const Tensor& grad_loss, const Tensor& logprob_gradient,
                                     const Tensor& entropy_gradient, const Tensor& scales) {
  const char* op = "policy_loss_backward";
  const ScalarType type = logprob_gradient.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, op,
        "logprob_gradient must be float32 or float64, got ", toString(type));
  const auto checked = [&](const char* name, const Tensor& t, ScalarType dtype,
                           const Shape& shape) {
    return check_rows(op, name, t, "logprob_gradient", logprob_gradient, dtype, shape);
  };
  return {checked("grad_loss", grad_loss, type, {}),
          checked("logprob_gradient", logprob_gradient, type, shape_of(logprob_gradient)),
          checked("entropy_gradient", entropy_gradient, type, shape_of(entropy_gradient)),
          checked("scales", scales, ScalarType::Double, {2})};
}

}  // namespace
}  // namespace tokcore
