// Sparse window attention, by tiles of pairs: rows of queries (of all heads that share their keys)
// against a tile of listed tokens or of the window's keys; for the gradients of keys the other way
// round. A tile is unpacked once for all its rows, and transposed where every product is to run
// along vectors. Each row knows the range of columns that it takes: what is masked is not computed
// with, NaN included. Tiles begin at multiples of their size and sums follow their order, so that
// no result depends on which rows stand together, or on the threads.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include "common/sparse_window_attention.h"

#include <cstdint>

#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"

namespace tokcore {

// Rows taken together, and columns of a tile: of a head of 128 in float32 a tile, its transposed
// form and the rows in flight stay in the first two caches.
constexpr int64_t kRows = 64, kColumns = 32;

struct WindowParams : WindowTensors {
  Storage storage;
  void* scratch;  // of a thread: scratch_bytes

  // Queries of a unit; its rows are those of all heads of the group.
  __attribute__((always_inline)) int64_t queries_together() const {
    return group() < kRows ? kRows / group() : 1;
  }
};

struct WindowRows {
  // Units (b, KV head, tile): of queries_together() queries for the first two, of kRows listed
  // tokens, of kRows keys. The gradients are found in this order: each needs those before it.
  void (*forward)(const WindowParams&, int64_t begin, int64_t end);
  void (*query_gradients)(const WindowParams&, int64_t begin, int64_t end);
  void (*listed_gradients)(const WindowParams&, int64_t begin, int64_t end);
  void (*key_gradients)(const WindowParams&, int64_t begin, int64_t end);
};
TOKCORE_DECLARE_LEVELS(WindowRows, sparse_window_attention_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/tiles.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

TOKCORE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TOKCORE_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// ---- tiles ------------------------------------------------------------------------------------

// The rows of a unit of queries: those of head 0 of the group, of head 1, ...
struct Unit {
  int64_t b, h, first, count, rows;  // h: the KV head

  TOKCORE_INLINE Unit of(const WindowParams& p, int64_t unit) {
    const int64_t most_here = p.queries_together();
    const int64_t tiles = (p.queries + most_here - 1) / most_here, of_head = unit / tiles;
    const int64_t first = unit % tiles * most_here, count = least(most_here, p.queries - first);
    return {of_head / p.key_heads, of_head % p.key_heads, first, count, count * p.group()};
  }
  TOKCORE_INLINE int64_t row(const WindowParams& p, const Unit& u, int64_t r) {
    return p.query_row(u.b, u.h * p.group() + r / u.count, u.first + r % u.count);
  }
};

// Columns of a tile: where they are in their tensor, and which of them each row of the unit takes.
struct Columns {
  int64_t count;
  int64_t at[kColumns];
  Range* ranges;
};

// visit(columns) for each tile of keys that a query of the unit sees: listed tokens before its
// window, then the window. `ranges` is memory for those of all rows.
template <typename Visit>
TOKCORE_INLINE void for_each_key_tile(const WindowParams& p, const Unit& u, Range* ranges,
                                      const Visit& visit) {
  Columns columns;
  columns.ranges = ranges;
  const int64_t first = p.offset() + u.first, last = first + u.count - 1;
  const auto visit_with = [&](const auto& range_of) __attribute__((always_inline)) {
    for (int64_t i = 0; i < u.count; ++i) ranges[i] = range_of(first + i);
    for (int64_t r = u.count; r < u.rows; ++r) ranges[r] = ranges[r - u.count];
    visit(static_cast<const Columns&>(columns));
  };
  const int64_t list = p.list(u.b, u.h), listed = p.index == nullptr ? 0 : p.counts[list];
  const int32_t* tokens = p.index + list * p.listed;
  for (int64_t m = 0; m < listed && tokens[m] <= last - p.window; m += kColumns) {
    columns.count = 0;
    for (int64_t j = 0; j < kColumns && m + j < listed && tokens[m + j] <= last - p.window; ++j)
      columns.at[columns.count++] = p.key_row(u.b, u.h, tokens[m + j]);
    int64_t seen = 0;
    visit_with([&](int64_t position) {
      while (seen < columns.count && tokens[m + seen] <= position - p.window) ++seen;
      return Range{0, seen};
    });
  }
  const int64_t from = most(0, first - p.window + 1) / kColumns * kColumns;
  for (int64_t j = from; j <= last; j += kColumns) {
    columns.count = least(kColumns, last + 1 - j);
    for (int64_t k = 0; k < columns.count; ++k) columns.at[k] = p.key_row(u.b, u.h, j + k);
    visit_with([&](int64_t position) {
      return Range{most(0, position - p.window + 1 - j), least(columns.count, position + 1 - j)};
    });
  }
}

// Keys of a unit, by position, and whether it is their window's queries or those beyond it.
struct Keys {
  int64_t b, h, count;
  int64_t at[kRows];
  bool beyond;
};

// The same for each tile of queries that sees one of the keys.
template <typename Visit>
TOKCORE_INLINE void for_each_query_tile(const WindowParams& p, const Keys& keys, Range* ranges,
                                        const Visit& visit) {
  Columns columns;
  columns.ranges = ranges;
  const auto first_of = [&](int64_t key) {
    return most(0, key - p.offset() + (keys.beyond ? p.window : 0));
  };
  const auto end_of = [&](int64_t key) {
    return keys.beyond ? p.queries : least(p.queries, key - p.offset() + p.window);
  };
  const int64_t from = first_of(keys.at[0]) / kColumns * kColumns;
  for (int64_t g = 0; g < p.group(); ++g)
    for (int64_t t = from; t < end_of(keys.at[keys.count - 1]); t += kColumns) {
      columns.count = least(kColumns, p.queries - t);
      for (int64_t k = 0; k < columns.count; ++k)
        columns.at[k] = p.query_row(keys.b, keys.h * p.group() + g, t + k);
      for (int64_t i = 0; i < keys.count; ++i)
        ranges[i] = {most(0, first_of(keys.at[i]) - t),
                     least(columns.count, end_of(keys.at[i]) - t)};
      visit(static_cast<const Columns&>(columns));
    }
}

// The tile's rows; zeros beyond them.
template <typename T>
TOKCORE_INLINE void unpack_tile(const void* tensor, const Columns& columns, int64_t dim,
                                int64_t width, Acc<T> factor, Acc<T>* out) {
  for (int64_t j = 0; j < columns.count; ++j)
    unpack_row<T>(tensor, columns.at[j], dim, width, factor, out + j * width);
  fill(out + columns.count * width, (kColumns - columns.count) * width, Acc<T>(0));
}

// ---- forward ----------------------------------------------------------------------------------

template <typename S>
struct Running {
  S max, sum;
};

// The scores of a row become weights above its greatest so far; what was summed before follows.
template <typename S>
TOKCORE_INLINE void take_in(S* x, const Range& range, Running<S>& row, S* out, int64_t width) {
  using V = Vec<S>;
  fill_outside<kColumns>(x, range, -std::numeric_limits<S>::infinity());
  S top = block_max(x, kColumns);
  top = top > row.max ? top : row.max;
  if (top != row.max) {
    const S kept = reduce_max(exp2(V::all((row.max - top) * S(kLog2E))));
    V a, b;
    for (int64_t d = 0; d < width; d += kUnit<S>) {
      load2(out + d, a, b);
      store2(out + d, a * V::all(kept), b * V::all(kept));
    }
    row.sum *= kept;
    row.max = top;
  }
  row.sum += exponentials<kColumns>(x, anchor_of(top));
}

template <typename T>
void forward_unit(const WindowParams& p, int64_t unit) {
  using S = Acc<T>;
  const Unit u = Unit::of(p, unit);
  const int64_t width = padded<S>(p.dim), rows = u.rows;
  Carver scratch{static_cast<char*>(p.scratch)};
  S *x = scratch.take<S>(rows * width), *out = scratch.take<S>(rows * width);
  S *tile = scratch.take<S>(kColumns * width), *turned = scratch.take<S>(kColumns * width);
  S* weight = scratch.take<S>(rows * kColumns);
  Running<S>* running = scratch.take<Running<S>>(rows);
  for (int64_t r = 0; r < rows; ++r) {
    unpack_row<T>(p.query, Unit::row(p, u, r), p.dim, width, S(p.scale), x + r * width);
    running[r] = {-std::numeric_limits<S>::infinity(), S(0)};
  }
  fill(out, rows * width, S(0));
  for_each_key_tile(p, u, scratch.take<Range>(rows), [&](const Columns& columns) {
    unpack_tile<T>(p.key, columns, p.dim, width, S(1), tile);
    tile_transpose<kColumns>(tile, width, turned);
    tile_scores<kColumns>(x, width, columns.ranges, rows, turned, width, weight);
    for (int64_t r = 0; r < rows; ++r)
      if (!Range::is_empty(columns.ranges[r]))
        take_in(weight + r * kColumns, columns.ranges[r], running[r], out + r * width, width);
    unpack_tile<T>(p.value, columns, p.dim, width, S(1), tile);
    tile_combine<kColumns>(weight, columns.ranges, rows, tile, width, out);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = Unit::row(p, u, r);
    pack(out + r * width, S(1) / running[r].sum, p.dim, static_cast<T*>(p.output) + row * p.dim);
    static_cast<S*>(p.lse)[row] = S(double(running[r].max) + __builtin_log(double(running[r].sum)));
  }
}

template <void (*run)(const WindowParams&, int64_t unit)>
void each(const WindowParams& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) run(p, unit);
}
TOKCORE_BY_STORAGE(forward, WindowParams, each<forward_unit<T>>)

// ---- backward ---------------------------------------------------------------------------------

// delta is known when all of a query's keys are: until then the gradient is kept in two sums, of
// weight times slope and of weight.
template <typename T>
void query_gradient_unit(const WindowParams& p, int64_t unit) {
  using S = Acc<T>;
  const Unit u = Unit::of(p, unit);
  const int64_t width = padded<S>(p.dim), rows = u.rows;
  Carver scratch{static_cast<char*>(p.scratch)};
  S *x = scratch.take<S>(rows * width), *up = scratch.take<S>(rows * width);
  S *sloped = scratch.take<S>(rows * width), *mean = scratch.take<S>(rows * width);
  S *tile = scratch.take<S>(kColumns * width), *turned = scratch.take<S>(kColumns * width);
  S *weight = scratch.take<S>(rows * kColumns), *slope = scratch.take<S>(rows * kColumns);
  S *delta = scratch.take<S>(rows), *lse = scratch.take<S>(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = Unit::row(p, u, r);
    unpack_row<T>(p.query, row, p.dim, width, S(p.scale), x + r * width);
    unpack_row<T>(p.grad_output, row, p.dim, width, S(1), up + r * width);
    lse[r] = static_cast<const S*>(p.lse)[row];
  }
  fill(delta, rows, S(0));
  fill(sloped, rows * width, S(0));
  fill(mean, rows * width, S(0));
  for_each_key_tile(p, u, scratch.take<Range>(rows), [&](const Columns& columns) {
    unpack_tile<T>(p.value, columns, p.dim, width, S(1), tile);
    tile_transpose<kColumns>(tile, width, turned);
    tile_scores<kColumns>(up, width, columns.ranges, rows, turned, width, slope);
    unpack_tile<T>(p.key, columns, p.dim, width, S(1), tile);
    tile_transpose<kColumns>(tile, width, turned);
    tile_scores<kColumns>(x, width, columns.ranges, rows, turned, width, weight);
    for (int64_t r = 0; r < rows; ++r) {
      const Range& range = columns.ranges[r];
      if (Range::is_empty(range)) continue;
      fill_outside<kColumns>(weight + r * kColumns, range, -std::numeric_limits<S>::infinity());
      fill_outside<kColumns>(slope + r * kColumns, range, S(0));
      delta[r] += weighted_slopes<kColumns>(weight + r * kColumns, slope + r * kColumns, lse[r]);
    }
    tile_combine<kColumns>(slope, columns.ranges, rows, tile, width, sloped);
    tile_combine<kColumns>(weight, columns.ranges, rows, tile, width, mean);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = Unit::row(p, u, r);
    for (int64_t d = 0; d < width; ++d) sloped[r * width + d] -= delta[r] * mean[r * width + d];
    pack(sloped + r * width, S(p.scale), p.dim, static_cast<T*>(p.grad_query) + row * p.dim);
    static_cast<S*>(p.delta)[row] = delta[r];
  }
}

// Adds to the gradients of the keys, rows of `width`, what the queries give them.
template <typename T>
TOKCORE_INLINE void add_key_gradients(const WindowParams& p, const Keys& keys, Carver scratch,
                                      int64_t width, Acc<T>* grad_key, Acc<T>* grad_value) {
  using S = Acc<T>;
  S *x = scratch.take<S>(kRows * width), *up = scratch.take<S>(kRows * width);
  S *tile = scratch.take<S>(kColumns * width), *tile_up = scratch.take<S>(kColumns * width);
  S* turned = scratch.take<S>(kColumns * width);
  S *weight = scratch.take<S>(kRows * kColumns), *slope = scratch.take<S>(kRows * kColumns);
  S *lse = scratch.take<S>(kColumns), *delta = scratch.take<S>(kColumns);
  for (int64_t r = 0; r < keys.count; ++r) {
    const int64_t row = p.key_row(keys.b, keys.h, keys.at[r]);
    unpack_row<T>(p.key, row, p.dim, width, S(1), x + r * width);
    unpack_row<T>(p.value, row, p.dim, width, S(1), up + r * width);
  }
  for_each_query_tile(p, keys, scratch.take<Range>(kRows), [&](const Columns& columns) {
    for (int64_t j = 0; j < kColumns; ++j) {
      const bool is = j < columns.count;
      lse[j] = is ? static_cast<const S*>(p.lse)[columns.at[j]] : S(0);
      delta[j] = is ? static_cast<const S*>(p.delta)[columns.at[j]] : S(0);
    }
    unpack_tile<T>(p.grad_output, columns, p.dim, width, S(1), tile_up);
    tile_transpose<kColumns>(tile_up, width, turned);
    tile_scores<kColumns>(up, width, columns.ranges, keys.count, turned, width, slope);
    unpack_tile<T>(p.query, columns, p.dim, width, S(p.scale), tile);
    tile_transpose<kColumns>(tile, width, turned);
    tile_scores<kColumns>(x, width, columns.ranges, keys.count, turned, width, weight);
    for (int64_t r = 0; r < keys.count; ++r)
      if (!Range::is_empty(columns.ranges[r]))
        centered_slopes<kColumns>(weight + r * kColumns, slope + r * kColumns, lse, delta);
    tile_combine<kColumns>(slope, columns.ranges, keys.count, tile, width, grad_key);
    tile_combine<kColumns>(weight, columns.ranges, keys.count, tile_up, width, grad_value);
  });
}

// The tile of a unit of which a KV head has `of_head` entries.
TOKCORE_INLINE Keys keys_of(const WindowParams& p, int64_t unit, int64_t of_head, bool beyond) {
  const int64_t tiles = (of_head + kRows - 1) / kRows, head = unit / tiles;
  Keys keys;
  keys.b = head / p.key_heads;
  keys.h = head % p.key_heads;
  keys.beyond = beyond;
  keys.count = least(kRows, of_head - unit % tiles * kRows);
  for (int64_t r = 0; r < keys.count; ++r) keys.at[r] = unit % tiles * kRows + r;
  return keys;
}

// What listed tokens get from the queries beyond their windows.
template <typename T>
void listed_gradient_unit(const WindowParams& p, int64_t unit) {
  using S = Acc<T>;
  Keys keys = keys_of(p, unit, p.listed, true);
  const int64_t first = keys.at[0], width = padded<S>(p.dim), list = p.list(keys.b, keys.h);
  keys.count = least(keys.count, p.counts[list] - first);
  if (keys.count <= 0) return;
  for (int64_t r = 0; r < keys.count; ++r) keys.at[r] = p.index[list * p.listed + first + r];
  Carver scratch{static_cast<char*>(p.scratch)};
  S *grad_key = scratch.take<S>(kRows * width), *grad_value = scratch.take<S>(kRows * width);
  fill(grad_key, kRows * width, S(0));
  fill(grad_value, kRows * width, S(0));
  add_key_gradients<T>(p, keys, scratch, width, grad_key, grad_value);
  const int64_t to = p.listed_row(keys.b, keys.h, first) * width;
  for (int64_t i = 0; i < keys.count * width; ++i) {
    static_cast<S*>(p.listed_grad_key)[to + i] = grad_key[i];
    static_cast<S*>(p.listed_grad_value)[to + i] = grad_value[i];
  }
}

template <typename T>
void key_gradient_unit(const WindowParams& p, int64_t unit) {
  using S = Acc<T>;
  const Keys keys = keys_of(p, unit, p.keys, false);
  const int64_t width = padded<S>(p.dim), list = p.list(keys.b, keys.h);
  Carver scratch{static_cast<char*>(p.scratch)};
  S *grad_key = scratch.take<S>(kRows * width), *grad_value = scratch.take<S>(kRows * width);
  fill(grad_key, kRows * width, S(0));
  fill(grad_value, kRows * width, S(0));
  for (int64_t m = 0; p.index != nullptr && m < p.counts[list]; ++m) {
    const int64_t r = p.index[list * p.listed + m] - keys.at[0];
    if (r < 0 || r >= keys.count) continue;
    const int64_t from = p.listed_row(keys.b, keys.h, m) * width;
    for (int64_t d = 0; d < width; ++d) {
      grad_key[r * width + d] = static_cast<const S*>(p.listed_grad_key)[from + d];
      grad_value[r * width + d] = static_cast<const S*>(p.listed_grad_value)[from + d];
    }
  }
  add_key_gradients<T>(p, keys, scratch, width, grad_key, grad_value);
  for (int64_t r = 0; r < keys.count; ++r) {
    const int64_t to = p.key_row(keys.b, keys.h, keys.at[r]) * p.dim;
    pack(grad_key + r * width, S(1), p.dim, static_cast<T*>(p.grad_key) + to);
    pack(grad_value + r * width, S(1), p.dim, static_cast<T*>(p.grad_value) + to);
  }
}

TOKCORE_BY_STORAGE(query_gradients, WindowParams, each<query_gradient_unit<T>>)
TOKCORE_BY_STORAGE(listed_gradients, WindowParams, each<listed_gradient_unit<T>>)
TOKCORE_BY_STORAGE(key_gradients, WindowParams, each<key_gradient_unit<T>>)

}  // namespace

extern const WindowRows sparse_window_attention_rows = {forward, query_gradients, listed_gradients,
                                                        key_gradients};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "common/sparse_window_attention_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

// Rows of every level are padded to a multiple of this.
constexpr int64_t kMostUnit = 32;
int64_t most_width(const WindowTensors& p) {
  return (p.dim + kMostUnit - 1) / kMostUnit * kMostUnit;
}

// What a unit takes of its thread's scratch, at most: rows and tiles, weights and their slopes, and
// statistics and ranges of rows and columns; a line more for each of these.
int64_t scratch_bytes(const WindowTensors& p) {
  const int64_t rows = std::max(kRows, p.group());
  const int64_t entries =
      (4 * rows + 3 * kColumns) * most_width(p) + 2 * rows * kColumns + 4 * rows + 2 * kColumns;
  constexpr int64_t kArrays = 16, kLine = 64;
  return entries * int64_t(sizeof(double)) + kArrays * kLine;
}

using Units = void (*)(const WindowParams&, int64_t begin, int64_t end);

void run_units(Units units, const WindowParams& p, int64_t per_head, int64_t together) {
  const int64_t count = p.batch * p.key_heads * ((per_head + together - 1) / together);
  parallel_units(count, kBlockColumns, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes(p)]);
    WindowParams mine = p;
    mine.scratch = scratch.get();
    units(mine, begin, end);
  });
}

// Tokens of each list, which has to be one: ascending positions, then -1 only.
std::vector<int32_t> checked_counts(const char* op, const WindowTensors& p) {
  std::vector<int32_t> counts(p.batch * p.list_heads);
  for (size_t list = 0; p.index != nullptr && list < counts.size(); ++list) {
    const int32_t* tokens = p.index + int64_t(list) * p.listed;
    int64_t n = 0;
    for (; n < p.listed && tokens[n] != -1; ++n)
      check(tokens[n] >= 0 && tokens[n] < p.keys && (n == 0 || tokens[n] > tokens[n - 1]), op,
            "global_index must hold ascending positions in [0, ", p.keys, "), then -1, got ",
            tokens[n], n == 0 ? "" : " after " + std::to_string(tokens[n - 1]), " at ", n,
            " of list ", list);
    counts[list] = int32_t(n);
    for (; n < p.listed; ++n)
      check(tokens[n] == -1, op, "global_index must hold -1 only after the first -1, got ",
            tokens[n], " at ", n, " of list ", list);
  }
  return counts;
}

WindowOutputs sparse_window_attention_cpu(const Tensor& query, const Tensor& key,
                                          const Tensor& value, const std::optional<Tensor>& index,
                                          int64_t window, double scale) {
  const char* op = "sparse_window_attention";
  const WindowCall call = checked_window_call(op, query, key, value, index, window, scale);
  WindowParams p{call.tensors, storage_of(query), nullptr};
  const std::vector<int32_t> counts = checked_counts(op, p);
  p.counts = counts.data();
  Tensor output = new_gradient(query);
  Tensor lse = new_empty(query, call.of_rows(), call.statistics);
  p.output = output.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  run_units(TOKCORE_CHOSEN(sparse_window_attention_rows).forward, p, p.queries,
            p.queries_together());
  return {output, lse};
}

WindowGradients sparse_window_attention_backward_cpu(const Tensor& grad_output, const Tensor& query,
                                                     const Tensor& key, const Tensor& value,
                                                     const std::optional<Tensor>& index,
                                                     const Tensor& lse, int64_t window,
                                                     double scale) {
  const char* op = "sparse_window_attention_backward";
  WindowCall call = checked_window_call(op, query, key, value, index, window, scale);
  check_window_gradient(op, grad_output, lse, call);
  WindowParams p{call.tensors, storage_of(query), nullptr};
  const std::vector<int32_t> counts = checked_counts(op, p);
  p.counts = counts.data();
  Tensor grad_query = new_gradient(query), grad_key = new_gradient(key),
         grad_value = new_gradient(value);
  Tensor delta = new_empty(query, call.of_rows(), call.statistics);
  Shape of_listed = call.of_listed();
  of_listed.back() = most_width(p);
  Tensor listed_key = new_empty(query, of_listed, call.statistics),
         listed_value = new_empty(query, of_listed, call.statistics);
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.delta = delta.mutable_data_ptr();
  p.listed_grad_key = listed_key.mutable_data_ptr();
  p.listed_grad_value = listed_value.mutable_data_ptr();
  const WindowRows& rows = TOKCORE_CHOSEN(sparse_window_attention_rows);
  run_units(rows.query_gradients, p, p.queries, p.queries_together());
  run_units(rows.listed_gradients, p, p.listed, kRows);
  run_units(rows.key_gradients, p, p.keys, kRows);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("sparse_window_attention", TORCH_BOX(&tokcore::sparse_window_attention_cpu));
  m.impl("sparse_window_attention_backward",
         TORCH_BOX(&tokcore::sparse_window_attention_backward_cpu));
}

#endif
