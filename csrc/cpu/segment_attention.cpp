// Attention within segments. Positions that follow each other in one segment are a run, taken
// together: its keys (or, for the gradients of keys, its queries) are found once, and unpacked once
// for all of them, tile by tile, into rows of the accumulation type. Every result is summed in the
// order of positions, whatever the runs and threads.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include "common/segment_attention.h"

#include <cstdint>

#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"

namespace tokcore {

// Positions of a run at most, and rows of a tile, which with two of it stays in the first cache.
constexpr int64_t kRun = 32, kTile = 32;
// Pairs of a run with what it matches, at most (of one position: as many as there are).
constexpr int64_t kPairs = 16384;

struct SegmentAttentionParams : SegmentTensors {
  Storage storage;
  // Scratch of a thread, sized by scratch_entries: positions, and entries of the accumulation type.
  int64_t* list;
  void* scratch;
};

struct SegmentAttentionRows {
  // Units: queries (b, t) of the first two, keys (b, s) of the last, which needs what the second
  // wrote to delta and pulls.
  void (*forward)(const SegmentAttentionParams&, int64_t begin, int64_t end);
  void (*query_gradients)(const SegmentAttentionParams&, int64_t begin, int64_t end);
  void (*key_gradients)(const SegmentAttentionParams&, int64_t begin, int64_t end);
};
TOKCORE_DECLARE_LEVELS(SegmentAttentionRows, segment_attention_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/products.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

// ---- weights of a row -----------------------------------------------------------------------

// Scores become exponentials above their maximum; their sum.
template <typename S>
TOKCORE_INLINE S exponentials(S* x, int64_t n, S max) {
  using V = Vec<S>;
  const V top = V::all(max), to_log2 = V::all(S(kLog2E));
  V sum = V::all(0), a, b;
  for (int64_t j = 0; j < n; j += kUnit<S>) {
    load_unit(x + j, n - j, a, b);  // -inf beyond the end: exponentials of 0
    a = exp2((a - top) * to_log2);
    b = exp2((b - top) * to_log2);
    sum = sum + (a + b);
    store_unit(x + j, n - j, false, a, b);
  }
  return reduce_add(sum);
}

// The same against a maximum, and times an inverse, for each entry.
template <typename S>
TOKCORE_INLINE void weights_again(S* x, int64_t n, const S* max, const S* inverse) {
  using V = Vec<S>;
  const V to_log2 = V::all(S(kLog2E));
  V a, b, top_a, top_b, inverse_a, inverse_b;
  for (int64_t j = 0; j < n; j += kUnit<S>) {
    load_unit(x + j, n - j, a, b);
    load_unit(max + j, n - j, top_a, top_b);
    load_unit(inverse + j, n - j, inverse_a, inverse_b);
    store_unit(x + j, n - j, false, exp2((a - top_a) * to_log2) * inverse_a,
               exp2((b - top_b) * to_log2) * inverse_b);
  }
}

// ---- runs -----------------------------------------------------------------------------------

// Positions [first, first + count) of batch b, and the n positions of the other side that match.
struct Run {
  int64_t b, first, count, n;
};

// visit(run) for each run of [begin, end), cut where it has too many pairs.
template <typename Visit>
TOKCORE_INLINE void for_each_run(const int64_t* ids, int64_t length, const int64_t* others,
                                 int64_t other_length, int64_t* list, int64_t begin, int64_t end,
                                 const Visit& visit) {
  int64_t listed = -1, n = 0;  // the position whose matches are listed
  for (int64_t at = begin; at < end;) {
    const int64_t b = at / length, most_here = (b + 1) * length < end ? (b + 1) * length : end;
    if (listed < 0 || listed / length != b || ids[listed] != ids[at]) {
      n = 0;
      for (int64_t j = 0; j < other_length; ++j) {
        list[n] = j;
        n += others[b * other_length + j] == ids[at];
      }
      listed = at;
    }
    int64_t most = n == 0 ? length : kPairs / n;
    most = most < 1 ? 1 : most > kRun ? kRun : most;
    int64_t count = 1;
    while (count < most && at + count < most_here && ids[at + count] == ids[at]) ++count;
    visit(Run{b, at - b * length, count, n});
    at += count;
  }
}

template <typename S>
struct Carver {
  S* next;
  S* take(int64_t entries) {
    S* const taken = next;
    next += entries;
    return taken;
  }
};

template <typename S>
TOKCORE_INLINE void fill(S* x, int64_t n, S value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// Rows of the tile that begins at `from` in the list; returns how many.
template <typename T>
TOKCORE_INLINE int64_t unpack_tile(const T* rows, const int64_t* list, int64_t from, int64_t n,
                                   int64_t dim, int64_t width, Acc<T>* tile) {
  const int64_t count = n - from < kTile ? n - from : kTile;
  for (int64_t j = 0; j < count; ++j) unpack(rows + list[from + j] * dim, dim, tile + j * width);
  return count;
}

template <typename T>
TOKCORE_INLINE void unpack_run(const T* rows, const Run& run, int64_t dim, int64_t width,
                               Acc<T>* out) {
  for (int64_t i = 0; i < run.count; ++i)
    unpack(rows + (run.first + i) * dim, dim, out + i * width);
}

template <typename T>
TOKCORE_INLINE void pack_run(const Acc<T>* rows, const Run& run, int64_t dim, int64_t width,
                             T* out) {
  for (int64_t i = 0; i < run.count; ++i)
    pack(rows + i * width, Acc<T>(1), dim, out + (run.first + i) * dim);
}

// ---- forward --------------------------------------------------------------------------------

TOKCORE_INLINE int64_t equal_words(const SegmentTensors& p, int64_t b, int64_t t) {
  const int64_t* words = p.key_words + b * p.keys;
  const int64_t word = p.query_words[b * p.queries + t];
  int64_t equal = 0;
  for (int64_t s = 0; s < p.keys; ++s) equal += words[s] == word;
  return equal;
}

// Of one query, from the sum over the heads of its weights on the listed keys.
template <typename S>
S constraint_of(const SegmentTensors& p, int64_t b, int64_t t, const int64_t* list, int64_t n,
                const S* mean) {
  if (n == 0) return S(0);
  const Pull<S> pull = pull_of(Matches{n, equal_words(p, b, t)}, S(0), p.heads);
  double total = 0;
  for (int64_t j = 0; j < n; ++j) {
    const bool same = p.key_words[b * p.keys + list[j]] == p.query_words[b * p.queries + t];
    const double miss = pull.miss(mean[j] * S(p.share), same);
    total += miss * miss;
  }
  return S(total / double(n));
}

template <typename T>
void forward_run(const SegmentAttentionParams& p, const Run& run) {
  using S = Acc<T>;
  const int64_t width = padded<S>(p.dim), n = run.n, of_run = run.count * width;
  Carver<S> scratch{static_cast<S*>(p.scratch)};
  S *x = scratch.take(of_run), *out = scratch.take(of_run), *tile = scratch.take(kTile * width);
  S *weight = scratch.take(run.count * n), *mean = scratch.take(run.count * n);
  const bool with_mean = p.query_words != nullptr || p.weights != nullptr;
  if (with_mean) fill(mean, run.count * n, S(0));
  for (int64_t h = 0; h < p.heads; ++h) {
    const int64_t row = p.query_row(run.b, h, 0), key_row = p.key_row(run.b, h, 0);
    unpack_run(static_cast<const T*>(p.query) + row * p.dim, run, p.dim, width, x);
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t count = unpack_tile(static_cast<const T*>(p.key) + key_row * p.dim, p.list, j,
                                        n, p.dim, width, tile);
      products(x, run.count, tile, count, width, S(p.scale), weight + j, n);
    }
    S* stats = static_cast<S*>(p.stats) + 2 * (row + run.first);
    for (int64_t i = 0; i < run.count; ++i) {
      const S max = n > 0 ? block_max(weight + i * n, n) : S(0);
      stats[2 * i] = max;
      stats[2 * i + 1] = n > 0 ? S(1) / exponentials(weight + i * n, n, max) : S(0);
    }
    fill(out, of_run, S(0));
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t count = unpack_tile(static_cast<const T*>(p.value) + key_row * p.dim, p.list, j,
                                        n, p.dim, width, tile);
      combine(weight + j, n, run.count, tile, count, width, out);
    }
    for (int64_t i = 0; i < run.count; ++i) {
      const S inverse = stats[2 * i + 1];
      pack(out + i * width, inverse, p.dim,
           static_cast<T*>(p.output) + (row + run.first + i) * p.dim);
      for (int64_t j = 0; with_mean && j < n; ++j) mean[i * n + j] += weight[i * n + j] * inverse;
    }
  }
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t query = run.b * p.queries + run.first + i;
    if (p.query_words != nullptr)
      static_cast<S*>(p.constraint)[query] =
          constraint_of(p, run.b, run.first + i, p.list, n, mean + i * n);
    if (p.weights == nullptr) continue;
    S* weights = static_cast<S*>(p.weights) + query * p.keys;
    fill(weights, p.keys, S(0));
    for (int64_t j = 0; j < n; ++j) weights[p.list[j]] = mean[i * n + j] * S(p.share);
  }
}

template <typename T>
void forward_units(const SegmentAttentionParams& p, int64_t begin, int64_t end) {
  for_each_run(p.query_segments, p.queries, p.key_segments, p.keys, p.list, begin, end,
               [&](const Run& run) { forward_run<T>(p, run); });
}
TOKCORE_BY_STORAGE(forward, SegmentAttentionParams, forward_units<T>)

// ---- backward -------------------------------------------------------------------------------

// Gradients of the positions of a run. What is said of queries with their gradients and of keys
// with their values is the same but for who is in the run: x, dx are its rows, y, dy the others'.
template <bool kOfKeys, typename T>
void gradient_run(const SegmentAttentionParams& p, const Run& run) {
  using S = Acc<T>;
  const int64_t width = padded<S>(p.dim), n = run.n, of_run = run.count * width;
  const int64_t pairs = run.count * n;
  Carver<S> scratch{static_cast<S*>(p.scratch)};
  S *x = scratch.take(of_run), *out = scratch.take(of_run), *tile = scratch.take(kTile * width);
  S *max = scratch.take(n), *inverse = scratch.take(n), *delta = scratch.take(n);
  S *pull = scratch.take(pairs), *slope = scratch.take(pairs);
  S* weight = scratch.take(p.heads * pairs);
  const S scale = S(p.scale);
  const auto rows_of = [&](const void* tensor, bool of_keys, int64_t h) {
    const int64_t row = of_keys ? p.key_row(run.b, h, 0) : p.query_row(run.b, h, 0);
    return static_cast<const T*>(tensor) + row * p.dim;
  };
  // out(i, j) = factor * x(i) . y(j) of one head.
  const auto all_products = [&](const void* rows, const void* others, int64_t h, S factor, S* to) {
    unpack_run(rows_of(rows, kOfKeys, h), run, p.dim, width, x);
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t count =
          unpack_tile(rows_of(others, !kOfKeys, h), p.list, j, n, p.dim, width, tile);
      products(x, run.count, tile, count, width, factor, to + j, n);
    }
  };
  // The gradient of one head: sum over j of by(i, j) y(j).
  const auto all_combined = [&](const S* by, const void* others, int64_t h, void* gradient) {
    fill(out, of_run, S(0));
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t count =
          unpack_tile(rows_of(others, !kOfKeys, h), p.list, j, n, p.dim, width, tile);
      combine(by + j, n, run.count, tile, count, width, out);
    }
    pack_run(out, run, p.dim, width, const_cast<T*>(rows_of(gradient, kOfKeys, h)));
  };
  const void *mine = kOfKeys ? p.key : p.query, *others = kOfKeys ? p.query : p.key;
  const void *mine_up = kOfKeys ? p.value : p.grad_output,
             *others_up = kOfKeys ? p.grad_output : p.value;

  if (p.grad_constraint != nullptr) fill(pull, pairs, S(0));
  for (int64_t h = 0; h < p.heads; ++h) {
    S* here = weight + h * pairs;
    all_products(mine, others, h, scale, here);
    const S* stats = static_cast<const S*>(p.stats) + 2 * p.query_row(run.b, h, 0);
    for (int64_t j = 0; kOfKeys && j < n; ++j) {
      max[j] = stats[2 * p.list[j]];
      inverse[j] = stats[2 * p.list[j] + 1];
    }
    for (int64_t i = 0; i < run.count; ++i) {
      if (!kOfKeys) {
        fill(max, n, stats[2 * (run.first + i)]);
        fill(inverse, n, stats[2 * (run.first + i) + 1]);
      }
      weights_again(here + i * n, n, max, inverse);
    }
    for (int64_t k = 0; p.grad_constraint != nullptr && k < pairs; ++k) pull[k] += here[k];
  }
  // From the sum of the weights to the gradient by each of them.
  for (int64_t i = 0; p.grad_constraint != nullptr && i < run.count; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t t = kOfKeys ? p.list[j] : run.first + i,
                    s = kOfKeys ? run.first + i : p.list[j];
      const int64_t query = run.b * p.queries + t;
      Pull<S>& of_query = static_cast<Pull<S>*>(p.pulls)[query];
      if (!kOfKeys && j == 0)
        of_query = pull_of(Matches{n, equal_words(p, run.b, t)},
                           static_cast<const S*>(p.grad_constraint)[query], p.heads);
      const bool same = p.query_words[query] == p.key_words[run.b * p.keys + s];
      pull[i * n + j] = of_query.slope * of_query.miss(pull[i * n + j] * S(p.share), same);
    }
  }
  for (int64_t h = 0; h < p.heads; ++h) {
    const S* here = weight + h * pairs;
    all_products(mine_up, others_up, h, S(1), slope);
    if (p.grad_constraint != nullptr)
      for (int64_t k = 0; k < pairs; ++k) slope[k] += pull[k];
    S* deltas = static_cast<S*>(p.delta) + p.query_row(run.b, h, 0);
    for (int64_t j = 0; kOfKeys && j < n; ++j) delta[j] = deltas[p.list[j]];
    for (int64_t i = 0; i < run.count; ++i) {
      const S* w = here + i * n;
      S* by = slope + i * n;
      if (!kOfKeys) {
        double total = 0;
        for (int64_t j = 0; j < n; ++j) total += double(w[j]) * double(by[j]);
        deltas[run.first + i] = S(total);
        fill(delta, n, S(total));
      }
      for (int64_t j = 0; j < n; ++j) by[j] = w[j] * (by[j] - delta[j]) * scale;
    }
    all_combined(slope, others, h, kOfKeys ? p.grad_key : p.grad_query);
    if (kOfKeys) all_combined(here, others_up, h, p.grad_value);
  }
}

template <typename T>
void query_gradient_units(const SegmentAttentionParams& p, int64_t begin, int64_t end) {
  for_each_run(p.query_segments, p.queries, p.key_segments, p.keys, p.list, begin, end,
               [&](const Run& run) { gradient_run<false, T>(p, run); });
}
template <typename T>
void key_gradient_units(const SegmentAttentionParams& p, int64_t begin, int64_t end) {
  for_each_run(p.key_segments, p.keys, p.query_segments, p.queries, p.list, begin, end,
               [&](const Run& run) { gradient_run<true, T>(p, run); });
}
TOKCORE_BY_STORAGE(query_gradients, SegmentAttentionParams, query_gradient_units<T>)
TOKCORE_BY_STORAGE(key_gradients, SegmentAttentionParams, key_gradient_units<T>)

}  // namespace

extern const SegmentAttentionRows segment_attention_rows = {forward, query_gradients,
                                                            key_gradients};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "common/segment_attention_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

// Entries that a run takes of its thread's scratch, at most: rows and a tile, weights of all heads,
// and what is kept for a pair or an other position. Only what a run uses is ever touched.
int64_t scratch_entries(const SegmentTensors& p) {
  constexpr int64_t kMostUnit = 32;
  const int64_t width = (p.dim + kMostUnit - 1) / kMostUnit * kMostUnit;
  const int64_t most = std::max(p.queries, p.keys), pairs = std::max(kPairs, most);
  return (2 * kRun + kTile) * width + (p.heads + 2) * pairs + 3 * most;
}

using Units = void (*)(const SegmentAttentionParams&, int64_t begin, int64_t end);

void run_units(Units units, const SegmentAttentionParams& p, int64_t count) {
  parallel_units(count, p.heads * p.dim, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<int64_t[]> list(new int64_t[std::max(p.queries, p.keys) + 1]);
    const std::unique_ptr<double[]> scratch(new double[scratch_entries(p)]);
    SegmentAttentionParams mine = p;
    mine.list = list.get();
    mine.scratch = scratch.get();
    units(mine, begin, end);
  });
}

SegmentOutputs segment_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& query_segments, const Tensor& key_segments,
                                     const std::optional<Tensor>& query_words,
                                     const std::optional<Tensor>& key_words, double scale,
                                     bool with_weights) {
  const SegmentCall call =
      checked_segment_call("segment_attention", query, key, value, query_segments, key_segments,
                           query_words, key_words, scale);
  SegmentAttentionParams p{call.tensors, storage_of(query), nullptr, nullptr};
  const Shape none = {0};
  Tensor output = new_gradient(query);
  Tensor constraint = new_empty(query, query_words ? call.of_queries() : none, call.statistics);
  Tensor weights =
      new_empty(query, with_weights ? with_last(call.of_queries(), p.keys) : none, call.statistics);
  Tensor stats = new_empty(query, with_last(call.of_rows(), 2), call.statistics);
  p.output = output.mutable_data_ptr();
  p.constraint = constraint.mutable_data_ptr();
  p.weights = with_weights ? weights.mutable_data_ptr() : nullptr;
  p.stats = stats.mutable_data_ptr();
  run_units(TOKCORE_CHOSEN(segment_attention_rows).forward, p, p.batch * p.queries);
  return {output, constraint, weights, stats};
}

SegmentGradients segment_attention_backward_cpu(
    const Tensor& grad_output, const std::optional<Tensor>& grad_constraint, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& query_segments,
    const Tensor& key_segments, const std::optional<Tensor>& query_words,
    const std::optional<Tensor>& key_words, const Tensor& stats, double scale) {
  const char* op = "segment_attention_backward";
  SegmentCall call = checked_segment_call(op, query, key, value, query_segments, key_segments,
                                          query_words, key_words, scale);
  check_segment_gradients(op, grad_output, grad_constraint, stats, call);
  SegmentAttentionParams p{call.tensors, storage_of(query), nullptr, nullptr};
  Tensor grad_query = new_gradient(query), grad_key = new_gradient(key),
         grad_value = new_gradient(value);
  Tensor delta = new_empty(query, call.of_rows(), call.statistics);
  Tensor pulls = new_empty(query, with_last(call.of_queries(), 2), call.statistics);
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.delta = delta.mutable_data_ptr();
  p.pulls = pulls.mutable_data_ptr();
  run_units(TOKCORE_CHOSEN(segment_attention_rows).query_gradients, p, p.batch * p.queries);
  run_units(TOKCORE_CHOSEN(segment_attention_rows).key_gradients, p, p.batch * p.keys);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("segment_attention", TORCH_BOX(&tokcore::segment_attention_cpu));
  m.impl("segment_attention_backward", TORCH_BOX(&tokcore::segment_attention_backward_cpu));
}

#endif
