// The call of sparse_window_attention and of its backward as both devices take it: arguments are
// checked here, before anything is allocated.
#pragma once

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "common/sparse_window_attention.h"

namespace tokcore {
namespace {

constexpr int64_t kMostWindowDim = 256;

struct WindowCall {
  WindowTensors tensors{};
  ScalarType type{}, statistics{};
  // What the pointers point to.
  std::optional<Tensor> query, key, value, index, lse, grad_output;

  Shape of_rows() const { return {tensors.batch, tensors.heads, tensors.queries}; }
  Shape of_lists() const { return {tensors.batch, tensors.list_heads}; }
  Shape of_listed() const {
    return {tensors.batch, tensors.key_heads, tensors.listed, tensors.dim};
  }
};

inline void check_window_index(const char* op, const Tensor& query,
                               const std::optional<Tensor>& index, WindowCall& call) {
  WindowTensors& p = call.tensors;
  p.list_heads = 1;
  if (!index.has_value()) return;
  check_device(op, "global_index", *index, "query", query);
  check_type(op, "global_index", *index, ScalarType::Int);
  check(index->dim() == 3 && index->size(0) == p.batch &&
            (index->size(1) == 1 || index->size(1) == p.key_heads),
        op, "global_index must have shape (", p.batch, ", Hg, M) with Hg 1 or ", p.key_heads,
        ", got ", to_text(shape_of(*index)));
  p.list_heads = index->size(1);
  p.listed = index->size(2);
  call.index = torch::stable::contiguous(*index);
  p.index = p.listed > 0 ? data_or_null<int32_t>(call.index) : nullptr;
}

inline WindowCall checked_window_call(const char* op, const Tensor& query, const Tensor& key,
                                      const Tensor& value, const std::optional<Tensor>& index,
                                      int64_t window, double scale) {
  WindowCall call;
  call.type = query.scalar_type();
  call.statistics = statistics_type(query);
  check(call.type == ScalarType::Float || call.type == ScalarType::Double ||
            call.type == ScalarType::Half || call.type == ScalarType::BFloat16,
        op, "query must be float32, float64, float16 or bfloat16, got ", toString(call.type));
  check(query.dim() == 4 && query.size(1) >= 1 && query.size(3) >= 1 &&
            query.size(3) <= kMostWindowDim,
        op, "query must have shape (B, Hq, T, D) with Hq >= 1 and 1 <= D <= ", kMostWindowDim,
        ", got ", to_text(shape_of(query)));
  check(key.dim() == 4 && key.size(1) >= 1 && query.size(1) % key.size(1) == 0 &&
            key.size(2) >= query.size(2),
        op, "key must have shape (B, Hkv, S, D) with Hkv a divisor of ", query.size(1),
        " and S >= ", query.size(2), ", got ", to_text(shape_of(key)));
  check(window >= 1, op, "window must be at least 1, got ", window);
  WindowTensors& p = call.tensors;
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(2);
  p.dim = query.size(3);
  p.key_heads = key.size(1);
  p.keys = key.size(2);
  p.window = std::min(window, std::max<int64_t>(1, p.keys));
  p.scale = scale;
  check(p.keys < (int64_t(1) << 31), op, "key must have S < 2^31, got ", p.keys);
  const Shape of_keys = {p.batch, p.key_heads, p.keys, p.dim};
  call.key = check_rows(op, "key", key, "query", query, call.type, of_keys);
  call.value = check_rows(op, "value", value, "query", query, call.type, of_keys);
  check_window_index(op, query, index, call);
  call.query = torch::stable::contiguous(query);
  p.query = call.query->const_data_ptr();
  p.key = call.key->const_data_ptr();
  p.value = call.value->const_data_ptr();
  return call;
}

inline void check_window_gradient(const char* op, const Tensor& grad_output, const Tensor& lse,
                                  WindowCall& call) {
  const Tensor& query = *call.query;
  call.grad_output =
      check_rows(op, "grad_output", grad_output, "query", query, call.type, shape_of(query));
  call.lse = check_rows(op, "lse", lse, "query", query, call.statistics, call.of_rows());
  call.tensors.grad_output = call.grad_output->const_data_ptr();
  call.tensors.lse = const_cast<void*>(call.lse->const_data_ptr());
}

using WindowOutputs = std::tuple<Tensor, Tensor>;
using WindowGradients = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace
}  // namespace tokcore
