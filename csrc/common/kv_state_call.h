// Checks that the operators on a sparse key-value cache share: before anything is allocated or
// written.
#pragma once

#include "common/check.h"
#include "common/kv_state.h"

namespace tokcore {
namespace {

// A tensor of the state is written where it lies, so a copy of it would be of no use.
inline void check_state(const char* op, const char* name, const Tensor& t, const char* like_name,
                        const Tensor& like, ScalarType type, const Shape& shape) {
  check_device(op, name, t, like_name, like);
  check_type(op, name, t, type);
  check_shape(op, name, t, shape);
  check(t.is_contiguous(), op, name, " is written in place and must be contiguous, got a view of ",
        "shape ", to_text(shape_of(t)));
}

inline Tensor check_input(const char* op, const char* name, const Tensor& t, const char* like_name,
                          const Tensor& like, ScalarType type, const Shape& shape) {
  check_device(op, name, t, like_name, like);
  check_type(op, name, t, type);
  check_shape(op, name, t, shape);
  return torch::stable::contiguous(t);
}

// Of one tensor of lists (B, Hs, C); heads stay unknown.
inline KvSizes list_sizes(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 3 && t.size(1) >= 1, op, name, " must have shape (B, Hs, C) with Hs >= 1, got ",
        to_text(shape_of(t)));
  check(t.size(2) <= kMostPosition, op, name, " must have at most ", kMostPosition, " slots, got ",
        t.size(2));
  return {t.size(0), t.size(1), t.size(1), t.size(2)};
}

// Keys and values (B, Hkv, C, D) with the lists (B, Hs, C) of `position`; uint8 together with
// quantisations (B, Hkv, C, Z, 2).
struct KvStore {
  KvSizes sizes;
  int64_t dim, groups;  // groups: Z of the keys, 0 where nothing is quantised
  int64_t value_groups;
  ScalarType type;

  bool quantized() const { return groups > 0; }
};

inline int64_t checked_quantization(const char* op, const char* name,
                                    const std::optional<Tensor>& t, const Tensor& key,
                                    bool quantized) {
  check(t.has_value() == quantized, op, name,
        quantized ? " must be given with uint8 keys and values, got none"
                  : " belongs to uint8 keys and values, got others");
  if (!quantized) return 0;
  const int64_t groups = t->dim() == 5 ? t->size(3) : 0;
  check(groups >= 1 && key.size(3) % groups == 0, op, name,
        " must have shape (B, Hkv, C, Z, 2) with Z dividing D = ", key.size(3), ", got ",
        to_text(shape_of(*t)));
  const Shape shape = {key.size(0), key.size(1), key.size(2), groups, 2};
  check_state(op, name, *t, "key", key, ScalarType::Float, shape);
  return groups;
}

inline KvStore checked_store(const char* op, const Tensor& key, const Tensor& value,
                             const Tensor& position, const Tensor& last_selected,
                             const Tensor& count, const std::optional<Tensor>& key_quantization,
                             const std::optional<Tensor>& value_quantization) {
  const ScalarType type = key.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
            type == ScalarType::BFloat16 || type == ScalarType::Byte,
        op, "key must be float32, float64, float16, bfloat16 or uint8, got ", toString(type));
  check(key.dim() == 4 && key.size(1) >= 1 && key.size(3) >= 1, op,
        "key must have shape (B, Hkv, C, D) with Hkv >= 1 and D >= 1, got ",
        to_text(shape_of(key)));
  KvStore store;
  store.type = type;
  store.dim = key.size(3);
  store.sizes = list_sizes(op, "position", position);
  store.sizes.heads = key.size(1);
  const KvSizes& sizes = store.sizes;
  check(sizes.lists == 1 || sizes.lists == sizes.heads, op,
        "position must have one list, or one for each of the ", sizes.heads, " heads, got ",
        sizes.lists);
  const Shape lists = {key.size(0), sizes.lists, key.size(2)};
  check_state(op, "key", key, "key", key, type, shape_of(key));
  check_state(op, "value", value, "key", key, type, shape_of(key));
  check_state(op, "position", position, "key", key, ScalarType::Int, lists);
  check_state(op, "last_selected", last_selected, "key", key, ScalarType::Int, lists);
  check_state(op, "count", count, "key", key, ScalarType::Int, {lists[0], lists[1]});
  const bool quantized = type == ScalarType::Byte;
  store.groups = checked_quantization(op, "key_quantization", key_quantization, key, quantized);
  store.value_groups =
      checked_quantization(op, "value_quantization", value_quantization, key, quantized);
  return store;
}

// ---- facts about values, which only the CPU looks at before it writes anything ---------------

inline void check_counts(const char* op, const int32_t* count, const KvSizes& sizes, int64_t most) {
  for (int64_t list = 0; list < sizes.all_lists(); ++list)
    check(count[list] >= 0 && count[list] <= most, op, "count must lie in [0, ", most, "], got ",
          count[list], " in list ", list % sizes.lists, " of row ", list / sizes.lists);
}

inline void check_not_negative(const char* op, const char* name, const int32_t* values,
                               int64_t rows) {
  for (int64_t b = 0; b < rows; ++b)
    check(values[b] >= 0, op, name, " must be at least 0, got ", values[b], " in row ", b);
}

}  // namespace
}  // namespace tokcore
