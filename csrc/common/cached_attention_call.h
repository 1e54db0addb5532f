// The calls of sparse_decode_attention and prompt_window_scores as both devices take them:
// arguments are checked here, before anything is allocated.
#pragma once

#include "common/cached_attention.h"
#include "common/check.h"

namespace tokcore {
namespace {

constexpr int64_t kMostCachedDim = 256;

struct CachedCall {
  CachedAttention tensors{};
  ScalarType type{}, statistics{};
  // What the pointers point to.
  std::optional<Tensor> query, key, value, key_quantization, value_quantization, index, count;

  bool quantized() const { return tensors.key.quantization != nullptr; }
};

// A cache is never copied for its leading strides.
inline CachedTensor check_cached(const char* op, const char* name, const Tensor& t,
                                 const char* pairs_name, const std::optional<Tensor>& pairs,
                                 const Shape& shape, const Tensor& query,
                                 std::optional<Tensor>& kept, std::optional<Tensor>& kept_pairs) {
  check_device(op, name, t, "query", query);
  check_shape(op, name, t, shape);
  if (!pairs.has_value()) {
    check_type(op, name, t, query.scalar_type());
  } else {
    check(t.scalar_type() == ScalarType::Byte, op, name, " must be uint8 with ", pairs_name,
          ", got ", toString(t.scalar_type()));
    check_device(op, pairs_name, *pairs, "query", query);
    check_type(op, pairs_name, *pairs, ScalarType::Float);
    const int64_t groups = pairs->dim() == 5 ? pairs->size(3) : 0;
    check(groups >= 1 && shape[3] % groups == 0, op, pairs_name,
          " must have shape (B, Hkv, C, Z, 2) with Z a divisor of D = ", shape[3], ", got ",
          to_text(shape_of(*pairs)));
    check_shape(op, pairs_name, *pairs, {shape[0], shape[1], shape[2], groups, 2});
  }
  kept = unit_last_stride(t);
  CachedTensor out{};
  out.data = kept->const_data_ptr();
  out.batch_stride = kept->stride(0);
  out.head_stride = kept->stride(1);
  out.slot_stride = kept->stride(2);
  if (!pairs.has_value()) return out;
  const bool packed = pairs->stride(4) == 1 && (pairs->size(3) == 1 || pairs->stride(3) == 2);
  kept_pairs = packed ? *pairs : torch::stable::contiguous(*pairs);
  out.quantization = static_cast<const float*>(kept_pairs->const_data_ptr());
  out.batch_pairs = kept_pairs->stride(0);
  out.head_pairs = kept_pairs->stride(1);
  out.slot_pairs = kept_pairs->stride(2);
  return out;
}

// What both have: query (B, Hq, D) or (B, Hq, Q, D), key and count.
inline CachedCall checked_cached_call(const char* op, const Tensor& query, const Tensor& key,
                                      const Tensor& count,
                                      const std::optional<Tensor>& key_quantization, bool several,
                                      double scale) {
  CachedCall call;
  call.type = query.scalar_type();
  call.statistics = statistics_type(query);
  const bool wide = call.type == ScalarType::Double;
  check(call.type == ScalarType::Float || wide || call.type == ScalarType::Half ||
            call.type == ScalarType::BFloat16,
        op, "query must be float32, float64, float16 or bfloat16, got ", toString(call.type));
  check(!(wide && key_quantization.has_value()), op,
        "query must be float32, float16 or bfloat16 with key_quantization, got ",
        toString(call.type));
  const int64_t dims = several ? 4 : 3;
  check(query.dim() == dims && query.size(1) >= 1 && query.size(-1) >= 1 &&
            query.size(-1) <= kMostCachedDim,
        op, "query must have shape ", several ? "(B, Hq, Q, D)" : "(B, Hq, D)",
        " with Hq >= 1 and 1 <= D <= ", kMostCachedDim, ", got ", to_text(shape_of(query)));
  CachedAttention& p = call.tensors;
  p.batch = query.size(0);
  p.query_heads = query.size(1);
  p.queries = several ? query.size(2) : 1;
  p.dim = query.size(-1);
  p.scale = scale;
  check(key.dim() == 4 && key.size(1) >= 1 && p.query_heads % key.size(1) == 0, op,
        "key must have shape (B, Hkv, C, D) with Hkv a divisor of Hq = ", p.query_heads, ", got ",
        to_text(shape_of(key)));
  p.heads = key.size(1);
  p.capacity = p.listed = key.size(2);
  p.key =
      check_cached(op, "key", key, "key_quantization", key_quantization,
                   {p.batch, p.heads, p.capacity, p.dim}, query, call.key, call.key_quantization);
  p.groups = key_quantization.has_value() ? key_quantization->size(3) : 1;
  check_device(op, "count", count, "query", query);
  check_type(op, "count", count, ScalarType::Int);
  check(count.dim() == 2 && count.size(0) == p.batch &&
            (count.size(1) == 1 || count.size(1) == p.heads),
        op, "count must have shape (", p.batch, ", Hs) with Hs = 1 or ", p.heads, ", got ",
        to_text(shape_of(count)));
  p.lists = count.size(1);
  call.count = torch::stable::contiguous(count);
  p.count = static_cast<const int32_t*>(call.count->const_data_ptr());
  call.query = torch::stable::contiguous(query);
  p.query = call.query->const_data_ptr();
  return call;
}

inline CachedCall checked_decode_call(const char* op, const Tensor& query, const Tensor& key,
                                      const Tensor& value, const std::optional<Tensor>& index,
                                      const Tensor& count,
                                      const std::optional<Tensor>& key_quantization,
                                      const std::optional<Tensor>& value_quantization,
                                      double scale) {
  check(key_quantization.has_value() == value_quantization.has_value(), op,
        "key_quantization and value_quantization go together, got one of them");
  CachedCall call = checked_cached_call(op, query, key, count, key_quantization, false, scale);
  CachedAttention& p = call.tensors;
  p.value = check_cached(op, "value", value, "value_quantization", value_quantization,
                         {p.batch, p.heads, p.capacity, p.dim}, query, call.value,
                         call.value_quantization);
  if (value_quantization.has_value())
    check_shape(op, "value_quantization", *value_quantization, shape_of(*key_quantization));
  if (!index.has_value()) return call;
  check(index->dim() == 3, op, "index must have shape (B, Hs, M), got ", to_text(shape_of(*index)));
  p.listed = index->size(2);
  call.index =
      check_rows(op, "index", index, "query", query, ScalarType::Int, {p.batch, p.lists, p.listed});
  p.index = data_or_null<int32_t>(call.index);
  return call;
}

// On the CPU, where a wrong value raises before anything is allocated.
inline void check_counts(const char* op, const CachedAttention& p) {
  for (int64_t list = 0; list < p.batch * p.lists; ++list)
    check(p.has_valid_count(list), op, "count must lie in [0, ", p.listed, "], got ", p.count[list],
          " in batch ", list / p.lists, ", list ", list % p.lists);
}

inline void check_listed_slots(const char* op, const CachedAttention& p) {
  for (int64_t list = 0; p.index != nullptr && list < p.batch * p.lists; ++list) {
    const int32_t* const slots = p.index + list * p.listed;
    int64_t before = -1;
    for (int64_t j = 0; j < p.count[list]; ++j) {
      check(slots[j] > before && slots[j] < p.capacity, op,
            "index must hold ascending slots in [0, ", p.capacity, "), got ", slots[j], " after ",
            before, " at (", list / p.lists, ", ", list % p.lists, ", ", j, ")");
      before = slots[j];
    }
  }
}

}  // namespace
}  // namespace tokcore
