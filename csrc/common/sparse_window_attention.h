// Sparse window attention as CPU and CUDA share it: where the tensors of a call are, and which
// pairs of a query and a key there are, each of them once: those of the window, and apart from them
// a listed token with the queries beyond its window.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TOKCORE_WINDOW_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_WINDOW_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

// All contiguous: rows (B, Hq, T, D) and (B, Hkv, S, D) of the storage type, statistics in the
// accumulation type.
struct WindowTensors {
  int64_t batch, heads, key_heads, queries, keys, dim;
  int64_t window;  // in [1, max(1, S)]
  int64_t list_heads, listed;
  double scale;
  const void *query, *key, *value;
  const int32_t* index;   // (B, Hg, M); null where M is 0
  const int32_t* counts;  // (B, Hg): tokens of each list, -1 where it is not one
  void *output, *lse;     // lse (B, Hq, T): log of the sum of exponentials
  // backward
  const void* grad_output;
  void *grad_query, *grad_key, *grad_value;
  void* delta;  // (B, Hq, T): sum of weight times its gradient
  // (B, Hkv, M, D) of the accumulation type: what the gradients of listed tokens get from queries
  // beyond their windows.
  void *listed_grad_key, *listed_grad_value;

  TOKCORE_WINDOW_HD int64_t group() const { return heads / key_heads; }
  TOKCORE_WINDOW_HD int64_t query_row(int64_t b, int64_t h, int64_t t) const {
    return (b * heads + h) * queries + t;
  }
  TOKCORE_WINDOW_HD int64_t key_row(int64_t b, int64_t h, int64_t s) const {
    return (b * key_heads + h) * keys + s;
  }
  TOKCORE_WINDOW_HD int64_t listed_row(int64_t b, int64_t h, int64_t m) const {
    return (b * key_heads + h) * listed + m;
  }
  // The list of a KV head.
  TOKCORE_WINDOW_HD int64_t list(int64_t b, int64_t h) const {
    return b * list_heads + (list_heads == 1 ? 0 : h);
  }
  // Where query 0 stands.
  TOKCORE_WINDOW_HD int64_t offset() const { return keys - queries; }
};

}  // namespace
}  // namespace tokcore
