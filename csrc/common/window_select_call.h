// The call of window_select as both devices take it: tensors are checked here, before anything is
// allocated.
#pragma once

#include "common/kv_state_call.h"

namespace tokcore {
namespace {

struct SelectTensors {
  KvSizes sizes;
  int64_t size, sinks;
  const int64_t* score;  // (B, Hs, C)
  const int32_t *count, *local, *top;
  int32_t *index, *selected;  // (B, Hs, size), (B, Hs)

  // Whether the values of a list allow a selection.
  TOKCORE_KV_HD bool valid(int64_t list) const {
    const int64_t b = list / sizes.lists, n = count[list];
    return n >= 0 && n <= sizes.slots && local[b] >= 0 && top[b] >= 0 &&
           int64_t(local[b]) + top[b] + sinks <= size;
  }
  TOKCORE_KV_HD Selection selection(int64_t list) const {
    const int64_t b = list / sizes.lists;
    return selection_of(count[list], local[b], top[b], sinks);
  }
};

struct SelectCall {
  SelectTensors p;
  std::optional<Tensor> score, count, local, top;  // what the pointers point to

  Shape lists() const { return {p.sizes.batch, p.sizes.lists}; }
};

inline SelectCall checked_select(const char* op, const Tensor& score, const Tensor& count,
                                 const Tensor& local, const Tensor& top, int64_t size,
                                 int64_t sinks) {
  const KvSizes sizes = list_sizes(op, "score", score);
  const Shape batch = {sizes.batch};
  check(size >= 0 && size <= kMostPosition, op, "size must lie in [0, ", kMostPosition, "], got ",
        size);
  check(sinks >= 0, op, "sinks must be at least 0, got ", sinks);
  const auto input = [&](const char* name, const Tensor& t, ScalarType type, const Shape& shape) {
    return check_input(op, name, t, "score", score, type, shape);
  };
  SelectCall call;
  call.score = input("score", score, ScalarType::Long, shape_of(score));
  call.count = input("count", count, ScalarType::Int, {sizes.batch, sizes.lists});
  call.local = input("local", local, ScalarType::Int, batch);
  call.top = input("top", top, ScalarType::Int, batch);
  call.p = {sizes,
            size,
            sinks,
            data_or_null<int64_t>(call.score),
            data_or_null<int32_t>(call.count),
            data_or_null<int32_t>(call.local),
            data_or_null<int32_t>(call.top),
            nullptr,
            nullptr};
  return call;
}

}  // namespace
}  // namespace tokcore
