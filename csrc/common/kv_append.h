// Tokens on their way into a sparse key-value cache, as both devices see them.
#pragma once

#include "common/kv_state.h"

namespace tokcore {
namespace {

struct Appended {
  void* stored;         // (B, Hkv, C, D)
  float* quantization;  // (B, Hkv, C, Z, 2); null: as it is
  const void* tokens;   // (B, Hkv, Q, D)
  int64_t groups;
};

struct KvAppend {
  KvSizes sizes;
  int64_t dim, queries;  // Q
  int64_t entry_bytes;   // of the tokens, and where nothing is quantised of what is stored
  Appended sides[2];     // keys, values
  int32_t *position, *last_selected, *count;
  const int32_t *length, *valid_tokens;

  // Whether the values of a list allow the tokens of its row: they fit, and stand after what is
  // there.
  TOKCORE_KV_HD bool valid(int64_t list) const {
    const int64_t b = list / sizes.lists, n = count[list], added = valid_tokens[b];
    return valid_row(b) && n >= 0 && n <= sizes.slots && n + added <= sizes.slots &&
           (n == 0 || added == 0 || position[list * sizes.slots + n - 1] < length[b]);
  }
  TOKCORE_KV_HD bool valid_row(int64_t b) const {
    return valid_tokens[b] >= 0 && valid_tokens[b] <= queries && length[b] >= 0 &&
           int64_t(length[b]) + valid_tokens[b] <= kMostPosition;
  }
  // Of token i of those that are appended, for a head of all B * Hkv.
  TOKCORE_KV_HD int64_t stored_row(int64_t head, int64_t i) const {
    return head * sizes.slots + count[sizes.list_of_head(head)] + i;
  }
  TOKCORE_KV_HD int64_t token_row(int64_t head, int64_t i) const {
    return head * queries + queries - valid_tokens[head / sizes.heads] + i;
  }
};

}  // namespace
}  // namespace tokcore
