// The call of kv_append as both devices take it: tensors are checked here, before anything is
// written.
#pragma once

#include "common/kv_append.h"
#include "common/kv_state_call.h"

namespace tokcore {
namespace {

struct KvAppendCall {
  KvAppend p;
  ScalarType tokens;  // their type
  bool quantized;
  std::optional<Tensor> new_key, new_value, length, valid;  // what the pointers point to
};

inline KvAppendCall checked_append(const char* op, Tensor& key, Tensor& value, Tensor& position,
                                   Tensor& last_selected, Tensor& count, const Tensor& new_key,
                                   const Tensor& new_value, const Tensor& length,
                                   const Tensor& valid, std::optional<Tensor>& key_quantization,
                                   std::optional<Tensor>& value_quantization) {
  const KvStore store = checked_store(op, key, value, position, last_selected, count,
                                      key_quantization, value_quantization);
  const KvSizes& sizes = store.sizes;
  KvAppendCall call;
  call.quantized = store.quantized();
  call.tokens = new_key.scalar_type();
  if (call.quantized) {
    check(call.tokens == ScalarType::Float || call.tokens == ScalarType::Half ||
              call.tokens == ScalarType::BFloat16,
          op, "new_key must be float32, float16 or bfloat16 to be quantised, got ",
          toString(call.tokens));
  } else {
    check_type(op, "new_key", new_key, store.type);
  }
  check(new_key.dim() == 4, op, "new_key must have shape (B, Hkv, Q, D), got ",
        to_text(shape_of(new_key)));
  const Shape tokens = {sizes.batch, sizes.heads, new_key.size(2), store.dim};
  const Shape batch = {sizes.batch};
  call.new_key = check_input(op, "new_key", new_key, "key", key, call.tokens, tokens);
  call.new_value = check_input(op, "new_value", new_value, "key", key, call.tokens, tokens);
  call.length = check_input(op, "length", length, "key", key, ScalarType::Int, batch);
  call.valid = check_input(op, "valid", valid, "key", key, ScalarType::Int, batch);
  const auto side = [](Tensor& stored, std::optional<Tensor>& quantization, const Tensor& from,
                       int64_t groups) {
    return Appended{stored.mutable_data_ptr(),
                    quantization ? static_cast<float*>(quantization->mutable_data_ptr()) : nullptr,
                    from.const_data_ptr(), groups};
  };
  call.p = {sizes,
            store.dim,
            new_key.size(2),
            int64_t(new_key.element_size()),
            {side(key, key_quantization, *call.new_key, store.groups),
             side(value, value_quantization, *call.new_value, store.value_groups)},
            static_cast<int32_t*>(position.mutable_data_ptr()),
            static_cast<int32_t*>(last_selected.mutable_data_ptr()),
            static_cast<int32_t*>(count.mutable_data_ptr()),
            data_or_null<int32_t>(call.length),
            data_or_null<int32_t>(call.valid)};
  return call;
}

}  // namespace
}  // namespace tokcore
