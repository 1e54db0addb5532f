// From what is known at run time to template arguments: f gets a value of the type, or a constant.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace tokcore {
namespace {

// One of the dtypes that check_logits lets pass.
template <typename F>
void dispatch_logits(torch::headeronly::ScalarType type, F f) {
  using torch::headeronly::ScalarType;
  if (type == ScalarType::Float) return f(float());
  if (type == ScalarType::BFloat16) return f(torch::headeronly::BFloat16());
  if (type == ScalarType::Half) return f(torch::headeronly::Half());
  return f(double());
}

template <int n>
using Constant = std::integral_constant<int, n>;

template <typename F>
void dispatch_bool(bool value, F f) {
  return value ? f(std::true_type()) : f(std::false_type());
}

}  // namespace
}  // namespace tokcore
