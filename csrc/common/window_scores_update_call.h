// The call of window_scores_update as both devices take it: tensors are checked here, before
// anything is written.
#pragma once

#include "common/kv_state_call.h"

namespace tokcore {
namespace {

struct WindowUpdate {
  KvSizes sizes;
  int64_t ring_rows, queries, listed;  // R, Q, M
  int64_t* score;                      // (B, Hs, C)
  float* ring;                         // (B, Hs, R, C)
  int32_t *last_selected, *oldest;     // (B, Hs, C), (B,)
  const float* rows;                   // (B, Hs, Q, M)
  const int32_t* index;                // (B, Hs, M); null: slots 0, 1, ...
  const int32_t *count, *step, *window;

  TOKCORE_KV_HD WindowStep step_of_row(int64_t b) const {
    return {step[b], window[b], oldest[b], ring_rows, queries};
  }
  TOKCORE_KV_HD float* ring_row(int64_t list, int64_t at) const {
    return ring + (list * ring_rows + at % ring_rows) * sizes.slots;
  }
  TOKCORE_KV_HD const float* weights(int64_t list, int64_t query) const {
    return rows + (list * queries + query) * listed;
  }
};

struct WindowUpdateCall {
  WindowUpdate p;
  std::optional<Tensor> rows, index, count, step, window;  // what the pointers point to
};

inline WindowUpdateCall checked_window_update(const char* op, Tensor& score, Tensor& ring,
                                              Tensor& last_selected, Tensor& oldest,
                                              const Tensor& rows,
                                              const std::optional<Tensor>& index,
                                              const Tensor& count, const Tensor& step,
                                              const Tensor& window) {
  const KvSizes sizes = list_sizes(op, "score", score);
  const Shape lists = {sizes.batch, sizes.lists}, batch = {sizes.batch};
  const Shape slots = with_last(lists, sizes.slots);
  check(ring.dim() == 4, op, "ring must have shape (B, Hs, R, C), got ", to_text(shape_of(ring)));
  check(rows.dim() == 4, op, "rows must have shape (B, Hs, Q, M), got ", to_text(shape_of(rows)));
  WindowUpdateCall call;
  WindowUpdate& p = call.p;
  p.sizes = sizes;
  p.ring_rows = ring.size(2);
  p.queries = rows.size(2);
  p.listed = rows.size(3);
  check(index.has_value() || p.listed == sizes.slots, op, "rows must weigh all ", sizes.slots,
        " slots where there is no index, got ", p.listed);
  check_state(op, "score", score, "score", score, ScalarType::Long, slots);
  check_state(op, "ring", ring, "score", score, ScalarType::Float,
              {sizes.batch, sizes.lists, p.ring_rows, sizes.slots});
  check_state(op, "last_selected", last_selected, "score", score, ScalarType::Int, slots);
  check_state(op, "oldest", oldest, "score", score, ScalarType::Int, batch);
  const auto input = [&](const char* name, const Tensor& t, const Shape& shape) {
    return check_input(op, name, t, "score", score, ScalarType::Int, shape);
  };
  call.rows = check_input(op, "rows", rows, "score", score, ScalarType::Float,
                          {sizes.batch, sizes.lists, p.queries, p.listed});
  if (index.has_value()) call.index = input("index", *index, with_last(lists, p.listed));
  call.count = input("count", count, lists);
  call.step = input("step", step, batch);
  call.window = input("window", window, batch);
  p.score = static_cast<int64_t*>(score.mutable_data_ptr());
  p.ring = static_cast<float*>(ring.mutable_data_ptr());
  p.last_selected = static_cast<int32_t*>(last_selected.mutable_data_ptr());
  p.oldest = static_cast<int32_t*>(oldest.mutable_data_ptr());
  p.rows = data_or_null<float>(call.rows);
  p.index = data_or_null<int32_t>(call.index);
  p.count = data_or_null<int32_t>(call.count);
  p.step = data_or_null<int32_t>(call.step);
  p.window = data_or_null<int32_t>(call.window);
  return call;
}

}  // namespace
}  // namespace tokcore
