// The call of group_advantage as both devices take it: arguments are checked here, before anything
// is allocated.
#pragma once

#include "common/advantage.h"
#include "common/check.h"

namespace tokcore {
namespace {

struct AdvantageCall {
  AdvantageRules rules{};
  Tensor rewards;
  std::optional<Tensor> group, order, weights;
  int64_t rows = 0, group_size = 0;

  template <typename T>
  AdvantageTensors<T> tensors(Tensor& advantage, Tensor& mean, Tensor& deviation) const {
    const bool statistics = rows > 0 && mean.numel() == rows;
    return {rules,
            rows,
            group_size,
            data_or_null<int64_t>(group),
            data_or_null<int64_t>(order),
            static_cast<const T*>(rewards.const_data_ptr()),
            data_or_null<T>(weights),
            static_cast<T*>(advantage.mutable_data_ptr()),
            statistics ? static_cast<T*>(mean.mutable_data_ptr()) : nullptr,
            statistics ? static_cast<T*>(deviation.mutable_data_ptr()) : nullptr};
  }
};

inline AdvantageCall checked_advantage(const char* op, const Tensor& rewards,
                                       const std::optional<Tensor>& group,
                                       const std::optional<Tensor>& order,
                                       const std::optional<Tensor>& weights, int64_t group_size,
                                       int64_t center, int64_t scale, int64_t ddof,
                                       int64_t singleton, double eps) {
  const ScalarType type = rewards.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, op,
        "rewards must be float32 or float64, got ", toString(type));
  check(rewards.dim() == 1, op, "rewards must have shape (B,), got ", to_text(shape_of(rewards)));
  const Shape shape = shape_of(rewards);
  const auto rows_of = [&](const char* name, const std::optional<Tensor>& t, ScalarType dtype) {
    return check_rows(op, name, t, "rewards", rewards, dtype, shape);
  };
  AdvantageCall call;
  call.rules = {static_cast<Center>(center), static_cast<Scale>(scale),
                static_cast<Singleton>(singleton), ddof, eps};
  call.rewards = torch::stable::contiguous(rewards);
  call.group = rows_of("group", group, ScalarType::Long);
  call.order = rows_of("order", order, ScalarType::Long);
  call.weights = rows_of("weights", weights, type);
  call.rows = shape[0];
  call.group_size = group_size;
  check(call.group.has_value() != (group_size > 0), op,
        "group must be ids or a size, one of the two, got size ", group_size);
  check(group_size <= 0 || call.rows % group_size == 0, op, "group of size ", group_size,
        " must divide the number of rewards, got ", call.rows);
  check(call.rules.center != Center::kWeightedMean || call.weights.has_value(), op,
        "weights are needed by a weighted mean, got none");
  return call;
}

}  // namespace
}  // namespace tokcore
