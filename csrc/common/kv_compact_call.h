// The call of kv_compact as both devices take it: tensors are checked here, before anything is
// written.
#pragma once

#include "common/kv_state_call.h"

namespace tokcore {
namespace {

// A tensor of the state as rows of C slots: which list moves them, and what is left behind.
struct Moved {
  char* data;
  int64_t rows, rows_of_list, slot_bytes;
  int left;  // every byte of a slot that becomes free; kAsItIs: none

  static constexpr int kAsItIs = -1;
  TOKCORE_KV_HD char* row(int64_t r, int64_t slots) const { return data + r * slots * slot_bytes; }
};
constexpr int kMostMoved = 8, kBytesOfMinusOne = 0xff;

struct KvCompact {
  KvSizes sizes;
  int64_t sinks;
  int32_t *last_selected, *count;
  const int32_t *since, *local;
  int moved;  // how many of these
  Moved tensors[kMostMoved];

  TOKCORE_KV_HD bool valid(int64_t list) const {
    return count[list] >= 0 && count[list] <= sizes.slots && local[list / sizes.lists] >= 0;
  }
  TOKCORE_KV_HD bool keeps_slot(int64_t list, int64_t slot) const {
    const int64_t b = list / sizes.lists;
    return keeps(slot, last_selected[list * sizes.slots + slot], count[list], since[b], local[b],
                 sinks);
  }
};

struct KvCompactCall {
  KvCompact p;
  std::optional<Tensor> since, local;  // what the pointers point to
};

inline KvCompactCall checked_compact(const char* op, Tensor& key, Tensor& value, Tensor& position,
                                     Tensor& score, Tensor& ring, Tensor& last_selected,
                                     Tensor& count, const Tensor& since, const Tensor& local,
                                     int64_t sinks, std::optional<Tensor>& key_quantization,
                                     std::optional<Tensor>& value_quantization) {
  const KvStore store = checked_store(op, key, value, position, last_selected, count,
                                      key_quantization, value_quantization);
  const KvSizes& sizes = store.sizes;
  check_state(op, "score", score, "key", key, ScalarType::Long, shape_of(position));
  check(ring.dim() == 4, op, "ring must have shape (B, Hs, R, C), got ", to_text(shape_of(ring)));
  const int64_t ring_rows = ring.size(2);
  check_state(op, "ring", ring, "key", key, ScalarType::Float,
              {sizes.batch, sizes.lists, ring_rows, sizes.slots});
  check(sinks >= 0, op, "sinks must be at least 0, got ", sinks);
  KvCompactCall call;
  const Shape batch = {sizes.batch};
  call.since = check_input(op, "since", since, "key", key, ScalarType::Int, batch);
  call.local = check_input(op, "local", local, "key", key, ScalarType::Int, batch);
  KvCompact& p = call.p;
  p.sizes = sizes;
  p.sinks = sinks;
  p.last_selected = static_cast<int32_t*>(last_selected.mutable_data_ptr());
  p.count = static_cast<int32_t*>(count.mutable_data_ptr());
  p.since = data_or_null<int32_t>(call.since);
  p.local = data_or_null<int32_t>(call.local);
  p.moved = 0;
  const auto move = [&](Tensor& t, int64_t rows_of_list, int64_t entries, int left) {
    p.tensors[p.moved++] = {static_cast<char*>(t.mutable_data_ptr()),
                            sizes.all_lists() * rows_of_list, rows_of_list,
                            entries * int64_t(t.element_size()), left};
  };
  const int64_t heads_of_list = sizes.heads / sizes.lists;
  move(key, heads_of_list, store.dim, Moved::kAsItIs);
  move(value, heads_of_list, store.dim, Moved::kAsItIs);
  if (store.quantized()) {
    move(*key_quantization, heads_of_list, 2 * store.groups, Moved::kAsItIs);
    move(*value_quantization, heads_of_list, 2 * store.value_groups, Moved::kAsItIs);
  }
  move(ring, ring_rows, 1, 0);
  move(score, 1, 1, 0);
  move(position, 1, 1, kBytesOfMinusOne);
  move(last_selected, 1, 1, kBytesOfMinusOne);
  return call;
}

}  // namespace
}  // namespace tokcore
