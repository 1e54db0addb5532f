// Attention within segments. A warp takes a query and a head, and finds its keys by their ids, 32
// at a time; a lane holds every 32nd entry of a row. Segments are short, so a row of keys is read
// from a near cache by each of its queries. What the constraint needs of all heads is a block's
// work: it is found from the scores again, as what is saved of a row gives its weights.
#include <torch/csrc/stable/library.h>

#include "common/namespace.h"
#include "common/segment_attention_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/vocabulary.cuh"

namespace tokcore {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpThreads;
// Others of which a block keeps the pull in shared memory: it is found anew for each group of heads
// only where there are more.
constexpr int kSpan = 1024;
constexpr int64_t kMostBatches = 65535;  // of grid.y

// ---- a row, spread over the lanes of a warp --------------------------------------------------

template <typename acc_t, int kPer>
struct Row {
  acc_t entry[kPer];  // of lane l: l, l + 32, ...; 0 beyond the row

  __device__ __forceinline__ void add(acc_t weight, const Row& other) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) entry[i] += weight * other.entry[i];
  }
  __device__ __forceinline__ void multiply(acc_t factor) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) entry[i] *= factor;
  }
};

template <int kPer, typename T>
__device__ __forceinline__ Row<Acc<T>, kPer> load_row(const void* rows, int64_t row, int64_t dim) {
  const T* const from = static_cast<const T*>(rows) + row * dim;
  Row<Acc<T>, kPer> x;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t d = threadIdx.x % kWarpThreads + i * kWarpThreads;
    x.entry[i] = d < dim ? Acc<T>(from[d]) : Acc<T>(0);
  }
  return x;
}

template <typename T, int kPer>
__device__ __forceinline__ void store_row(const Row<Acc<T>, kPer>& x, void* rows, int64_t row,
                                          int64_t dim) {
  T* const to = static_cast<T*>(rows) + row * dim;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t d = threadIdx.x % kWarpThreads + i * kWarpThreads;
    if (d < dim) to[d] = static_cast<T>(x.entry[i]);
  }
}

// In every lane.
template <typename acc_t, int kPer>
__device__ __forceinline__ acc_t dot(const Row<acc_t, kPer>& x, const Row<acc_t, kPer>& y) {
  acc_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum += x.entry[i] * y.entry[i];
#pragma unroll
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
    sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
  return sum;
}

// visit(position), by a whole warp, for each position of [begin, end) with this id.
template <typename Visit>
__device__ __forceinline__ void for_each_match(const int64_t* ids, int64_t begin, int64_t end,
                                               int64_t id, const Visit& visit) {
  for (int64_t from = begin; from < end; from += kWarpThreads) {
    const int64_t at = from + threadIdx.x % kWarpThreads;
    unsigned found = __ballot_sync(kWholeWarp, at < end && ids[at] == id);
    for (; found != 0; found &= found - 1) visit(from + __ffs(found) - 1);
  }
}

// ---- weights and their mean over the heads ---------------------------------------------------

// The weight that the forward gave a pair of this score.
template <typename acc_t>
__device__ __forceinline__ acc_t weight_of(const SegmentTensors& p, int64_t query_row,
                                           acc_t score) {
  const acc_t* const stats = static_cast<const acc_t*>(p.stats) + 2 * query_row;
  return exp2_of((score - stats[0]) * acc_t(kLog2E)) * stats[1];
}

template <typename T, int kPer>
__device__ __forceinline__ Acc<T> mean_weight(const SegmentTensors& p, int64_t b, int64_t t,
                                              int64_t s) {
  using acc_t = Acc<T>;
  acc_t sum = 0;
  for (int64_t h = 0; h < p.heads; ++h) {
    const int64_t query_row = p.query_row(b, h, t);
    const acc_t score = acc_t(p.scale) * dot(load_row<kPer, T>(p.query, query_row, p.dim),
                                             load_row<kPer, T>(p.key, p.key_row(b, h, s), p.dim));
    sum += weight_of(p, query_row, score);
  }
  return sum * acc_t(p.share);
}

struct MatchSums {
  double segment = 0, word = 0;
};
__device__ __forceinline__ Matches matches_of(const SegmentTensors& p, int64_t b, int64_t t) {
  const int64_t query = b * p.queries + t;
  MatchSums sums;
  for (int64_t s = threadIdx.x; s < p.keys; s += kThreads) {
    sums.segment += p.key_segments[b * p.keys + s] == p.query_segments[query];
    sums.word += p.key_words[b * p.keys + s] == p.query_words[query];
  }
  sums = block_sum(sums);
  return {int64_t(sums.segment), int64_t(sums.word)};
}

__device__ __forceinline__ bool same_word(const SegmentTensors& p, int64_t b, int64_t t,
                                          int64_t s) {
  return p.query_words[b * p.queries + t] == p.key_words[b * p.keys + s];
}

// ---- forward ---------------------------------------------------------------------------------

template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads) segment_attention_kernel(SegmentTensors p) {
  using acc_t = Acc<T>;
  const int warp = warp_of_thread();
  const int64_t rows = p.batch * p.heads * p.queries, stride = int64_t(gridDim.x) * kWarps;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < rows; row += stride) {
    const int64_t t = row % p.queries, of_head = row / p.queries, b = of_head / p.heads;
    const auto query = load_row<kPer, T>(p.query, row, p.dim);
    acc_t max = -kInfinity<acc_t>, sum = 0;
    bool any = false;
    Row<acc_t, kPer> out = {};
    for_each_match(p.key_segments + b * p.keys, 0, p.keys, p.query_segments[b * p.queries + t],
                   [&](int64_t s) {
                     const int64_t key_row = of_head * p.keys + s;
                     const auto value = load_row<kPer, T>(p.value, key_row, p.dim);
                     const acc_t score =
                         acc_t(p.scale) * dot(query, load_row<kPer, T>(p.key, key_row, p.dim));
                     // A maximum of -inf is anchored at 0: the exponentials are then 0 and not NaN.
                     const acc_t top = score > max ? score : max;
                     const acc_t anchor = top == -kInfinity<acc_t> ? acc_t(0) : top;
                     const acc_t kept = exp2_of((max - anchor) * acc_t(kLog2E));
                     const acc_t weight = exp2_of((score - anchor) * acc_t(kLog2E));
                     sum = sum * kept + weight;
                     out.multiply(kept);
                     out.add(weight, value);
                     max = top;
                     any = true;
                   });
    const acc_t inverse = any ? acc_t(1) / sum : acc_t(0);
    out.multiply(inverse);
    store_row<T>(out, p.output, row, p.dim);
    if (threadIdx.x % kWarpThreads == 0) {
      acc_t* const stats = static_cast<acc_t*>(p.stats) + 2 * row;
      stats[0] = max;
      stats[1] = inverse;
    }
  }
}

struct MissSum {
  double squares = 0;
};

// The constraint, and the weights where they are wanted: a block for each query.
template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads) segment_constraint_kernel(SegmentTensors p) {
  using acc_t = Acc<T>;
  const int lane = threadIdx.x % kWarpThreads, warp = warp_of_thread();
  for (int64_t query = blockIdx.x; query < p.batch * p.queries; query += gridDim.x) {
    const int64_t b = query / p.queries, t = query % p.queries, id = p.query_segments[query];
    const int64_t* const ids = p.key_segments + b * p.keys;
    acc_t* const weights =
        p.weights == nullptr ? nullptr : static_cast<acc_t*>(p.weights) + query * p.keys;
    for (int64_t s = threadIdx.x; weights != nullptr && s < p.keys; s += kThreads) {
      if (ids[s] != id) weights[s] = 0;
    }
    const bool with_words = p.query_words != nullptr;
    const Matches matches = with_words ? matches_of(p, b, t) : Matches{};
    const Pull<acc_t> pull = pull_of(matches, acc_t(0), p.heads);
    MissSum miss;
    int turn = 0;
    for_each_match(ids, 0, p.keys, id, [&](int64_t s) {
      if (turn++ % kWarps != warp) return;
      const acc_t weight = mean_weight<T, kPer>(p, b, t, s);
      if (lane != 0) return;
      if (weights != nullptr) weights[s] = weight;
      if (!with_words) return;
      const double missed = pull.miss(weight, same_word(p, b, t, s));
      miss.squares += missed * missed;
    });
    if (!with_words) continue;
    miss = block_sum(miss);
    if (threadIdx.x == 0)
      static_cast<acc_t*>(p.constraint)[query] =
          matches.segment == 0 ? acc_t(0) : acc_t(miss.squares / double(matches.segment));
  }
}

// ---- backward --------------------------------------------------------------------------------

// What the constraint wants of each query; a kernel of its own, as its divisions would cost the
// next one registers.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) segment_pull_kernel(SegmentTensors p) {
  for (int64_t query = blockIdx.x; query < p.batch * p.queries; query += gridDim.x) {
    const Matches matches = matches_of(p, query / p.queries, query % p.queries);
    if (threadIdx.x != 0) continue;
    static_cast<Pull<acc_t>*>(p.pulls)[query] =
        pull_of(matches, static_cast<const acc_t*>(p.grad_constraint)[query], p.heads);
  }
}

// A block for each query (x) of a batch (y), or for each key; its warps share out the heads. What
// is said of queries with their gradients and of keys with their values is the same but for whose
// gradients are wanted: x, x_up are of it, y, y_up of those that it matches.
template <typename T, int kPer, bool kOfKeys>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    segment_gradient_kernel(SegmentTensors p) {
  using acc_t = Acc<T>;
  TOKCORE_SHARED(acc_t, pulls, kSpan);
  const int warp = warp_of_thread();
  const int64_t count = kOfKeys ? p.keys : p.queries, others = kOfKeys ? p.queries : p.keys;
  const bool constrained = p.grad_constraint != nullptr;
  const Pull<acc_t>* const of_queries = static_cast<const Pull<acc_t>*>(p.pulls);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y)
    for (int64_t own = blockIdx.x; own < count; own += gridDim.x) {
      const int64_t id = (kOfKeys ? p.key_segments : p.query_segments)[b * count + own];
      const int64_t* const ids = (kOfKeys ? p.query_segments : p.key_segments) + b * others;
      // The gradients by the mean weights of the matches from `span` on.
      const auto hold_pulls = [&](int64_t span, int64_t end) {
        // Everyone has read the span before this one.
        __syncthreads();
        int turn = 0;
        for_each_match(ids, span, end, id, [&](int64_t other) {
          if (turn++ % kWarps != warp) return;
          const int64_t t = kOfKeys ? other : own, s = kOfKeys ? own : other;
          const Pull<acc_t> pull = of_queries[b * p.queries + t];
          const acc_t missed = pull.miss(mean_weight<T, kPer>(p, b, t, s), same_word(p, b, t, s));
          if (threadIdx.x % kWarpThreads == 0) pulls[other - span] = pull.slope * missed;
        });
        // The span is written.
        __syncthreads();
      };
      int64_t held = -1;
      for (int64_t first = 0; first < p.heads; first += kWarps) {
        const int64_t h = first + warp;
        const bool active = h < p.heads;
        const int64_t query_0 = p.query_row(b, active ? h : 0, 0),
                      key_0 = p.key_row(b, active ? h : 0, 0);
        const int64_t x_row = (kOfKeys ? key_0 : query_0) + own;
        const auto x = load_row<kPer, T>(kOfKeys ? p.key : p.query, x_row, p.dim);
        const auto x_up = load_row<kPer, T>(kOfKeys ? p.value : p.grad_output, x_row, p.dim);
        Row<acc_t, kPer> grad = {}, grad_up = {};
        acc_t delta = 0;
        // The gradient of a query needs its delta, so its keys are visited twice.
        for (int last = kOfKeys ? 1 : 0; last < 2; ++last) {
          for (int64_t span = 0; span < others; span += kSpan) {
            const int64_t end = span + kSpan < others ? span + kSpan : others;
            if (constrained && held != span) hold_pulls(span, end);
            held = span;
            if (!active) continue;
            for_each_match(ids, span, end, id, [&](int64_t other) {
              const int64_t y_row = (kOfKeys ? query_0 : key_0) + other;
              const int64_t query_row = kOfKeys ? y_row : x_row;
              const auto y = load_row<kPer, T>(kOfKeys ? p.query : p.key, y_row, p.dim);
              const auto y_up = load_row<kPer, T>(kOfKeys ? p.grad_output : p.value, y_row, p.dim);
              const acc_t weight = weight_of(p, query_row, acc_t(p.scale) * dot(x, y));
              acc_t slope = dot(x_up, y_up);
              if (constrained) slope += acc_t(pulls[other - span]);
              if (!kOfKeys && last == 0) {
                delta += weight * slope;
                return;
              }
              if (kOfKeys) delta = static_cast<const acc_t*>(p.delta)[query_row];
              grad.add(weight * (slope - delta) * acc_t(p.scale), y);
              if (kOfKeys) grad_up.add(weight, y_up);
            });
          }
        }
        if (!active) continue;
        store_row<T>(grad, kOfKeys ? p.grad_key : p.grad_query, x_row, p.dim);
        if (kOfKeys) store_row<T>(grad_up, p.grad_value, x_row, p.dim);
        if (!kOfKeys && threadIdx.x % kWarpThreads == 0)
          static_cast<acc_t*>(p.delta)[x_row] = delta;
      }
    }
}

// ---- host ------------------------------------------------------------------------------------

// f(element, entries of a row for each lane): few of them where a row is short.
template <typename F>
void dispatch_rows(const SegmentCall& call, F f) {
  dispatch_logits(call.type, [&](auto element) {
    if (call.tensors.dim <= 2 * kWarpThreads) return f(element, Constant<2>());
    return f(element, Constant<kMostHeadDim / kWarpThreads>());
  });
}

SegmentOutputs segment_attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const Tensor& query_segments, const Tensor& key_segments,
                                      const std::optional<Tensor>& query_words,
                                      const std::optional<Tensor>& key_words, double scale,
                                      bool with_weights) {
  const SegmentCall call =
      checked_segment_call("segment_attention", query, key, value, query_segments, key_segments,
                           query_words, key_words, scale);
  SegmentTensors p = call.tensors;
  const DeviceGuard guard(device_index(query));
  const Shape none = {0};
  const bool with_words = query_words.has_value();
  Tensor output = allocate_output(query, shape_of(query), call.type);
  Tensor constraint =
      allocate_output(query, with_words ? call.of_queries() : none, call.statistics);
  Tensor weights = allocate_output(
      query, with_weights ? with_last(call.of_queries(), p.keys) : none, call.statistics);
  Tensor stats = allocate_output(query, with_last(call.of_rows(), 2), call.statistics);
  p.output = output.mutable_data_ptr();
  p.constraint = constraint.mutable_data_ptr();
  p.weights = with_weights ? weights.mutable_data_ptr() : nullptr;
  p.stats = stats.mutable_data_ptr();
  const int64_t queries = p.batch * p.queries, rows = queries * p.heads;
  dispatch_rows(call, [&](auto element, auto per) {
    using T = decltype(element);
    launch(dim3(block_count((rows + kWarps - 1) / kWarps)), dim3(kThreads), 0,
           current_stream(query), segment_attention_kernel<T, per.value>, p);
    if (with_words || with_weights)
      launch(dim3(block_count(queries)), dim3(kThreads), 0, current_stream(query),
             segment_constraint_kernel<T, per.value>, p);
  });
  return {output, constraint, weights, stats};
}

SegmentGradients segment_attention_backward_cuda(
    const Tensor& grad_output, const std::optional<Tensor>& grad_constraint, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& query_segments,
    const Tensor& key_segments, const std::optional<Tensor>& query_words,
    const std::optional<Tensor>& key_words, const Tensor& stats, double scale) {
  const char* op = "segment_attention_backward";
  SegmentCall call = checked_segment_call(op, query, key, value, query_segments, key_segments,
                                          query_words, key_words, scale);
  check_segment_gradients(op, grad_output, grad_constraint, stats, call);
  SegmentTensors p = call.tensors;
  const DeviceGuard guard(device_index(query));
  Tensor grad_query = allocate_output(query, shape_of(query), call.type);
  Tensor grad_key = allocate_output(key, shape_of(key), call.type);
  Tensor grad_value = allocate_output(value, shape_of(value), call.type);
  Tensor delta = allocate_output(query, call.of_rows(), call.statistics);
  Tensor pulls = allocate_output(query, with_last(call.of_queries(), 2), call.statistics);
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.delta = delta.mutable_data_ptr();
  p.pulls = pulls.mutable_data_ptr();
  dispatch_rows(call, [&](auto element, auto per) {
    using T = decltype(element);
    const auto stream = current_stream(query);
    if (p.grad_constraint != nullptr)
      launch(dim3(block_count(p.batch * p.queries)), dim3(kThreads), 0, stream,
             segment_pull_kernel<Acc<T>>, p);
    const unsigned batches = unsigned(p.batch < kMostBatches ? p.batch : kMostBatches);
    launch(dim3(block_count(p.queries), batches), dim3(kThreads), 0, stream,
           segment_gradient_kernel<T, per.value, false>, p);
    launch(dim3(block_count(p.keys), batches), dim3(kThreads), 0, stream,
           segment_gradient_kernel<T, per.value, true>, p);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("segment_attention", TORCH_BOX(&tokcore::segment_attention_cuda));
  m.impl("segment_attention_backward", TORCH_BOX(&tokcore::segment_attention_backward_cuda));
}
