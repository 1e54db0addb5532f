// Attention to a cache of keys and values as CPU and CUDA share it: where the tensors of a call
// are, and how the states of blocks of slots meet.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TOKCORE_CACHE_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_CACHE_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

// Keys or values (B, Hkv, C, D), entries of a slot side by side; the other strides in entries. Of
// uint8 also (scale, offset) (B, Hkv, C, Z, 2) of each of Z equal groups of entries: what is meant
// is scale * entry + offset.
struct CachedTensor {
  const void* data;
  int64_t batch_stride, head_stride, slot_stride;
  const float* quantization;  // null: entries are what they are
  int64_t batch_pairs, head_pairs, slot_pairs;

  template <typename T>
  TOKCORE_CACHE_HD const T* head(int64_t b, int64_t h) const {
    return static_cast<const T*>(data) + b * batch_stride + h * head_stride;
  }
  TOKCORE_CACHE_HD const float* pairs(int64_t b, int64_t h) const {
    return quantization + b * batch_pairs + h * head_pairs;
  }
};

// One token's queries (B, Hq, D), or the last tokens' (B, Hq, Q, D); both contiguous. A list of
// slots is of a KV head, or of all of them: Hs = `lists`.
struct CachedAttention {
  int64_t batch, query_heads, heads, lists, queries, capacity, listed, dim, groups;
  double scale;
  const void* query;
  CachedTensor key, value;
  const int32_t* index;  // (B, Hs, M); null: slots 0, 1, ...
  const int32_t* count;  // (B, Hs)
  void *output, *weight_row, *lse, *rows;

  TOKCORE_CACHE_HD int64_t group() const { return query_heads / heads; }
  // Query heads that share a list.
  TOKCORE_CACHE_HD int64_t sharing() const { return query_heads / lists; }
  TOKCORE_CACHE_HD int64_t list_of(int64_t b, int64_t h) const {
    return b * lists + (lists == 1 ? 0 : h);
  }
  TOKCORE_CACHE_HD bool has_valid_count(int64_t list) const {
    return count[list] >= 0 && count[list] <= listed;
  }
  // Slots that query i of the last `queries` tokens sees of `used`.
  TOKCORE_CACHE_HD int64_t seen(int64_t used, int64_t i) const {
    const int64_t n = used - (queries - 1 - i);
    return n > 0 ? n : 0;
  }
};

// Of a block of slots: the greatest score and the sum of exp(score - anchor).
template <typename acc_t>
struct BlockSum {
  acc_t max, sum;
};

// The anchor of exponentials: where all scores are -inf they are 0 then, and not NaN.
template <typename acc_t>
TOKCORE_CACHE_HD acc_t finite_anchor(acc_t max) {
  return max == acc_t(-INFINITY) ? acc_t(0) : max;
}

// Of all blocks. Without a finite score, or with a NaN or +inf, `inverse` makes every weight NaN.
template <typename acc_t>
struct SoftmaxOfBlocks {
  acc_t max, sum, inverse;

  // What makes weights of the exponentials of a block.
  TOKCORE_CACHE_HD acc_t factor(const BlockSum<acc_t>& block) const {
    return std::exp(block.max - finite_anchor(max)) * inverse;
  }
  TOKCORE_CACHE_HD acc_t lse() const { return sum == acc_t(0) ? acc_t(NAN) : max + std::log(sum); }
};

template <typename acc_t>
TOKCORE_CACHE_HD SoftmaxOfBlocks<acc_t> softmax_of_blocks(const BlockSum<acc_t>* blocks,
                                                          int64_t count) {
  acc_t max = acc_t(-INFINITY), sum = 0;
  for (int64_t k = 0; k < count; ++k) max = blocks[k].max > max ? blocks[k].max : max;
  for (int64_t k = 0; k < count; ++k)
    sum += blocks[k].sum * std::exp(blocks[k].max - finite_anchor(max));
  return {max, sum, acc_t(1) / sum};
}

}  // namespace
}  // namespace tokcore
