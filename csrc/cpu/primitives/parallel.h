// Fronts only: how rows are shared out among torch's threads, and how large gradients get their
// pages.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "common/check.h"
#include "cpu/primitives/blocks.h"

namespace tokcore {
namespace {

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      return Storage::kFloat;
  }
}

// Too few rows to keep every thread busy: the rows are cut into their blocks instead.
inline bool split_rows(int64_t rows, int64_t columns) {
  return rows < 4 * int64_t(torch::stable::get_num_threads()) && columns > kBlockColumns;
}

// Runs body(begin, end) over `units` of about `elements` entries each; a thread gets at least half
// a block of them.
template <typename Body>
void parallel_units(int64_t units, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kBlockColumns / 2 / std::max<int64_t>(1, elements));
  if (units > 0) torch::stable::parallel_for(0, units, grain, body);
}

// Runs a forward pass over the rows in p.rows. The two ways of cutting it give the same bits.
template <typename State, typename Rows, typename Params>
void run_forward(const Rows& rows, Params& p, int64_t listed) {
  if (split_rows(listed, p.columns)) {
    const int64_t blocks = block_count(p.columns);
    std::vector<State> states(listed * blocks);
    p.blocks = states.data();
    parallel_units(listed * blocks, kBlockColumns,
                   [&](int64_t begin, int64_t end) { rows.forward_blocks(p, begin, end); });
    rows.merge_blocks(p, 0, listed);
  } else {
    parallel_units(listed, p.columns,
                   [&](int64_t begin, int64_t end) { rows.forward(p, begin, end); });
  }
}

// Runs a backward pass over the rows in p.rows: first the labels' entries, then the sweep that may
// overwrite the logits.
template <typename Rows, typename Params>
void run_backward(const Rows& rows, Params& p, int64_t listed) {
  p.segment = split_rows(listed, p.columns) ? kBlockColumns : p.columns;
  constexpr int64_t kLabelCost = kBlockColumns / 64;  // a few cache misses and an exponential a row
  parallel_units(listed, kLabelCost,
                 [&](int64_t begin, int64_t end) { rows.label_gradients(p, begin, end); });
  parallel_units(listed * ((p.columns + p.segment - 1) / p.segment), p.segment,
                 [&](int64_t begin, int64_t end) { rows.backward(p, begin, end); });
}

// The rows with a target to read, or every row without targets; those that `mask` drops are left
// out. Labels are checked on the way: on the CPU a label out of range raises, before anything is
// allocated.
inline std::vector<int64_t> kept_rows(const char* op, const std::optional<Target>& target,
                                      int64_t rows, int64_t columns, int64_t ignore_index,
                                      const bool* mask) {
  std::vector<int64_t> kept;
  kept.reserve(rows);
  const int64_t* ids = target ? static_cast<const int64_t*>(target->ids.const_data_ptr()) : nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    if (mask && !mask[row]) continue;
    bool keep = ids == nullptr;
    for (int64_t k = 0; ids && k < target->per_row; ++k) {
      const int64_t label = ids[row * target->per_row + k];
      if (label == ignore_index) continue;
      check(label >= 0 && label < columns, op, "target must lie in [0, ", columns,
            ") or be ignore_index (", ignore_index, "), got ", label, " at row ", row,
            " of the flattened rows");
      keep = true;
    }
    if (keep) kept.push_back(row);
  }
  return kept;
}

// Kept rows whose upstream gradients are not all exactly 0, and all other rows, whose gradient is
// exactly 0.
struct LiveRows {
  std::vector<int64_t> live, dead;
};
struct Upstream {
  const std::optional<Tensor>& values;
  int64_t per_row;
};
inline bool any_nonzero(const Upstream& upstream, int64_t row) {
  if (!upstream.values) return false;
  const bool wide = upstream.values->scalar_type() == ScalarType::Double;
  const void* data = upstream.values->const_data_ptr();
  for (int64_t i = row * upstream.per_row; i < (row + 1) * upstream.per_row; ++i)
    if ((wide ? static_cast<const double*>(data)[i] : double(static_cast<const float*>(data)[i])) !=
        0)
      return true;
  return false;
}
inline LiveRows live_rows(const std::vector<int64_t>& kept, int64_t rows,
                          std::initializer_list<Upstream> upstreams) {
  LiveRows out;
  auto next = kept.begin();
  for (int64_t row = 0; row < rows; ++row) {
    bool live = false;
    if (next != kept.end() && *next == row) {
      ++next;
      for (const Upstream& upstream : upstreams) live = live || any_nonzero(upstream, row);
    }
    (live ? out.live : out.dead).push_back(row);
  }
  return out;
}

inline void zero_rows(Tensor& gradient, const RowIndex& index, const std::vector<int64_t>& rows) {
  char* data = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t size = gradient.element_size(), columns = gradient.size(-1);
  parallel_units(static_cast<int64_t>(rows.size()), columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memset(data + index.offset(rows[i]) * size, 0, columns * size);
  });
}

// An uninitialised gradient (or another large output) like `logits`, contiguous. On 4 KB pages the
// first touch of a large tensor costs more than the sweep that fills it, so from 32 MB up the
// kernel is advised to use 2 MB pages (it may decline).
inline Tensor new_gradient(const Tensor& logits) {
  Tensor gradient = torch::stable::new_empty(logits, shape_of(logits));
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20, kWorthwhile = uintptr_t(32) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.data_ptr());
  const uintptr_t bytes = uintptr_t(gradient.numel()) * uintptr_t(gradient.element_size());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                  last = (begin + bytes) / kHugePage * kHugePage;
  if (bytes >= kWorthwhile && last > first)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return gradient;
}

// Beyond this a gradient cannot stay in the last cache level anyway, and streaming stores save the
// read for ownership.
inline bool worth_streaming(const Tensor& gradient) {
  return gradient.numel() * int64_t(gradient.element_size()) >= int64_t(32) << 20;
}

}  // namespace
}  // namespace tokcore
