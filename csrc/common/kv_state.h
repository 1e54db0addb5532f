// The sparse key-value cache of one layer as the operators on it share it, on both devices: sizes,
// which facts about values hold, the fixed point of the scores and the quantisation of tokens. All
// of it is exact or rounded in one stated way, so that every device gets the same bits.
//
// Slots [0, count) are in use, ascending in position. A list is a row of slots of batch item b that
// all heads share, or one of each head.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TOKCORE_KV_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_KV_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

constexpr int64_t kMostPosition = 2147483647;  // of int32

struct KvSizes {
  int64_t batch, lists, heads, slots;  // B, Hs (1 or Hkv), Hkv, C

  TOKCORE_KV_HD int64_t all_lists() const { return batch * lists; }
  TOKCORE_KV_HD int64_t list_of_head(int64_t head) const {  // head: of all B * Hkv
    return lists == 1 ? head / heads : head;
  }
};

// ---- scores ---------------------------------------------------------------------------------

// A weight in fixed point: round-half-even(weight * 2^40). Sums of it are exact in any order, and
// subtracting takes away what was added. They wrap beyond 2^23 weights of 1.
constexpr float kMostWeight = 2048;
TOKCORE_KV_HD bool is_weight(float weight) {  // false for NaN
  return weight >= -kMostWeight && weight <= kMostWeight;
}
TOKCORE_KV_HD int64_t fixed_point(float weight) {
  // The product is exact and below 2^51, and 1.5 * 2^52 leaves it the last bits of the sum.
  const double anchor = 6755399441055744.0, sum = double(weight) * 1099511627776.0 + anchor;
  int64_t bits, origin;
  memcpy(&bits, &sum, sizeof bits);
  memcpy(&origin, &anchor, sizeof origin);
  return bits - origin;
}
TOKCORE_KV_HD int64_t wrapping_sum(int64_t a, int64_t b) {
  return int64_t(uint64_t(a) + uint64_t(b));
}

// What window_scores_update does to the rows of one batch item.
struct WindowStep {
  int64_t step, window, oldest, ring_rows, queries;

  TOKCORE_KV_HD bool valid() const {
    return step >= -1 && window >= 0 && (ring_rows == 0 || window <= ring_rows) && oldest >= 0 &&
           oldest <= step + 1;
  }
  // The oldest row in the sum afterwards. Without a ring none ever leaves it.
  TOKCORE_KV_HD int64_t oldest_after() const {
    const int64_t first = step + 1 - window;
    return ring_rows == 0 || first < oldest ? oldest : first;
  }
  // Rows [oldest, leaving_end) leave the sum; those a whole ring later have never been written.
  TOKCORE_KV_HD int64_t leaving_end() const {
    const int64_t after = oldest_after(), most = oldest + ring_rows;
    return after < most ? after : most;
  }
  TOKCORE_KV_HD int64_t step_of(int64_t query) const { return step - (queries - 1) + query; }
  // Whether the row of a query enters the sum: rows of negative steps do not exist.
  TOKCORE_KV_HD bool enters(int64_t query) const {
    const int64_t at = step_of(query);
    return at >= 0 && at >= oldest_after();
  }
  // Of a query of a whole row (no index): slots below this are weighed.
  TOKCORE_KV_HD int64_t visible(int64_t query, int64_t count) const {
    const int64_t end = count - (queries - 1 - query);
    return end > 0 ? end : 0;
  }
};

// ---- selection ------------------------------------------------------------------------------

// Slots [0, first) and [last, count) are taken anyway, `ranked` of those between by their score.
struct Selection {
  int64_t first, last, ranked, count;

  TOKCORE_KV_HD int64_t selected() const { return first + ranked + (count - last); }
};
TOKCORE_KV_HD Selection selection_of(int64_t count, int64_t local, int64_t top, int64_t sinks) {
  const int64_t first = sinks < count ? sinks : count;
  int64_t last = local < count ? count - local : 0;
  if (last < first) last = first;
  return {first, last, top < last - first ? top : last - first, count};
}
// Ascending as the scores are, without a sign.
TOKCORE_KV_HD uint64_t score_key(int64_t score) { return uint64_t(score) ^ uint64_t(1) << 63; }

// Whether kv_compact keeps a slot in use.
TOKCORE_KV_HD bool keeps(int64_t slot, int64_t last_selected, int64_t count, int64_t since,
                         int64_t local, int64_t sinks) {
  return last_selected >= since || slot >= count - local || slot < sinks;
}

// ---- quantisation ---------------------------------------------------------------------------

// One group of a token in 8 bits: x = scale * q + offset. In double, so that no device contracts or
// rounds otherwise than the others.
struct Quantizer {
  double scale, zero;
  float stored_scale, stored_offset;

  // Of the least and greatest entry; of anything that is not finite: NaN for the whole group.
  TOKCORE_KV_HD Quantizer(float least, float greatest, bool finite) {
    scale = finite ? (double(greatest) - double(least)) / 255.0 : 0.0;
    zero = scale > 0 ? floor(-double(least) / scale + 0.5) : 0.0;
    stored_scale = finite ? float(scale) : NAN;
    stored_offset = !finite ? NAN : scale > 0 ? float(-scale * zero) : least;
  }
  // A group that does not vary, or is not finite, has code 0 everywhere.
  TOKCORE_KV_HD bool varies() const { return scale > 0; }
  TOKCORE_KV_HD uint8_t code(float x) const {
    const double q = floor(double(x) / scale + 0.5) + zero;
    return uint8_t(int(q < 0 ? 0.0 : q > 255 ? 255.0 : q));
  }
};

}  // namespace
}  // namespace tokcore
