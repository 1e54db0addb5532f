// The call of segment_attention and of its backward as both devices take it: arguments are checked
// here, before anything is allocated.
#pragma once

#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/segment_attention.h"

namespace tokcore {
namespace {

constexpr int64_t kMostHeadDim = 256;

struct SegmentCall {
  SegmentTensors tensors{};
  ScalarType type{}, statistics{};
  // What the pointers point to.
  std::optional<Tensor> query, key, value, query_segments, key_segments, query_words, key_words,
      stats, grad_output, grad_constraint;

  Shape of_queries() const { return {tensors.batch, tensors.queries}; }
  Shape of_rows() const { return {tensors.batch, tensors.heads, tensors.queries}; }
};

inline std::optional<Tensor> check_segment_ids(const char* op, const char* name,
                                               const std::optional<Tensor>& ids, const Tensor& like,
                                               const Shape& shape) {
  if (!ids.has_value()) return std::nullopt;
  const ScalarType type = ids->scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, op, name,
        " must be int64 or int32, got ", toString(type));
  check_device(op, name, *ids, "query", like);
  check_shape(op, name, *ids, shape);
  const Tensor wide = type == ScalarType::Long ? *ids : torch::stable::to(*ids, ScalarType::Long);
  return torch::stable::contiguous(wide);
}

inline SegmentCall checked_segment_call(const char* op, const Tensor& query, const Tensor& key,
                                        const Tensor& value, const Tensor& query_segments,
                                        const Tensor& key_segments,
                                        const std::optional<Tensor>& query_words,
                                        const std::optional<Tensor>& key_words, double scale) {
  SegmentCall call;
  call.type = query.scalar_type();
  call.statistics = statistics_type(query);
  check(call.type == ScalarType::Float || call.type == ScalarType::Double ||
            call.type == ScalarType::Half || call.type == ScalarType::BFloat16,
        op, "query must be float32, float64, float16 or bfloat16, got ", toString(call.type));
  check(
      query.dim() == 4 && query.size(1) >= 1 && query.size(3) >= 1 && query.size(3) <= kMostHeadDim,
      op, "query must have shape (B, H, T, D) with H >= 1 and 1 <= D <= ", kMostHeadDim, ", got ",
      to_text(shape_of(query)));
  check(key.dim() == 4, op, "key must have shape (B, H, S, D), got ", to_text(shape_of(key)));
  SegmentTensors& p = call.tensors;
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(2);
  p.keys = key.size(2);
  p.dim = query.size(3);
  p.scale = scale;
  p.share = 1.0 / double(p.heads);
  const Shape of_keys = {p.batch, p.heads, p.keys, p.dim};
  const Shape query_ids = {p.batch, p.queries}, key_ids = {p.batch, p.keys};
  check(query_words.has_value() == key_words.has_value(), op,
        "query_words and key_words go together, got one of them");
  const auto words = [&](const char* name, const std::optional<Tensor>& ids, const Shape& shape) {
    return check_segment_ids(op, name, ids, query, shape);
  };
  call.key = check_rows(op, "key", key, "query", query, call.type, of_keys);
  call.value = check_rows(op, "value", value, "query", query, call.type, of_keys);
  call.query_segments = words("query_segments", query_segments, query_ids);
  call.key_segments = words("key_segments", key_segments, key_ids);
  call.query_words = words("query_words", query_words, query_ids);
  call.key_words = words("key_words", key_words, key_ids);
  call.query = torch::stable::contiguous(query);
  p.query = call.query->const_data_ptr();
  p.key = call.key->const_data_ptr();
  p.value = call.value->const_data_ptr();
  p.query_segments = data_or_null<int64_t>(call.query_segments);
  p.key_segments = data_or_null<int64_t>(call.key_segments);
  p.query_words = data_or_null<int64_t>(call.query_words);
  p.key_words = data_or_null<int64_t>(call.key_words);
  return call;
}

inline void check_segment_gradients(const char* op, const Tensor& grad_output,
                                    const std::optional<Tensor>& grad_constraint,
                                    const Tensor& stats, SegmentCall& call) {
  SegmentTensors& p = call.tensors;
  const Tensor& query = *call.query;
  check(!grad_constraint.has_value() || call.query_words.has_value(), op,
        "grad_constraint needs query_words and key_words, got none");
  call.grad_output =
      check_rows(op, "grad_output", grad_output, "query", query, call.type, shape_of(query));
  call.grad_constraint = check_rows(op, "grad_constraint", grad_constraint, "query", query,
                                    call.statistics, call.of_queries());
  call.stats =
      check_rows(op, "stats", stats, "query", query, call.statistics, with_last(call.of_rows(), 2));
  p.grad_output = call.grad_output->const_data_ptr();
  p.grad_constraint = data_or_null<void>(call.grad_constraint);
  p.stats = const_cast<void*>(call.stats->const_data_ptr());
}

using SegmentOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SegmentGradients = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace
}  // namespace tokcore
