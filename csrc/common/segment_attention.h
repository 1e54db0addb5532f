// Attention within segments as CPU and CUDA share it: where the tensors of a call are, and the
// terms of the constraint on the mean of the heads' weights.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TOKCORE_SEGMENT_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_SEGMENT_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

// All contiguous: rows (B, H, T or S, D) of the storage type, ids (B, T or S), statistics in the
// accumulation type. A row's weights are exp(score - maximum) times the inverse of their sum:
// with that pair the backward finds the weights of the forward again, where a log of the sum at the
// maximum's size would have rounded them away.
struct SegmentTensors {
  int64_t batch, heads, queries, keys, dim;
  double scale, share;  // share: of a head in their mean, 1 / heads
  const void *query, *key, *value;
  const int64_t *query_segments, *key_segments;
  const int64_t *query_words, *key_words;  // null: no constraint
  void* stats;                             // (B, H, T, 2): maximum, inverse of the sum
  // forward
  void *output, *constraint, *weights;  // weights (B, T, S) null: not wanted
  // backward
  const void *grad_output, *grad_constraint;  // grad_constraint null: none
  void *grad_query, *grad_key, *grad_value;
  void* delta;  // (B, H, T): sum of weight times its gradient
  void* pulls;  // (B, T, 2): slope and target, as of Pull

  TOKCORE_SEGMENT_HD int64_t query_row(int64_t b, int64_t h, int64_t t) const {
    return (b * heads + h) * queries + t;
  }
  TOKCORE_SEGMENT_HD int64_t key_row(int64_t b, int64_t h, int64_t s) const {
    return (b * heads + h) * keys + s;
  }
};

// Of a query: how many keys are of its segment, and how many of its word.
struct Matches {
  int64_t segment, word;
};

// What the constraint wants of one query's mean weights: `target` on each key of its word, 0 on
// others. `slope` times a miss is the gradient by the weight of one head.
template <typename acc_t>
struct Pull {
  acc_t slope, target;

  TOKCORE_SEGMENT_HD acc_t miss(acc_t weight, bool same_word) const {
    return weight - (same_word ? target : acc_t(0));
  }
};

template <typename acc_t>
TOKCORE_SEGMENT_HD Pull<acc_t> pull_of(const Matches& matches, acc_t grad, int64_t heads) {
  const int64_t keys = matches.segment > 0 ? matches.segment : 1;
  const int64_t words = matches.word > 0 ? matches.word : 1;
  return {acc_t(2) * grad / (acc_t(heads) * acc_t(keys)), acc_t(1) / acc_t(words)};
}

}  // namespace
}  // namespace tokcore
