// The KL divergences of two distributions over one tile, in the form of common/online_softmax.h:
// sums of terms that are never negative, so that a divergence far below the rounding of a
// log-probability keeps its digits.
#pragma once

#include "common/online_softmax.h"
#include "cuda/primitives/vocabulary.cuh"

namespace tokcore {
namespace {

constexpr int kForwardKl = 1, kReverseKl = 2;  // bits of a direction

// Entries nearer to each other than this take the series of e^u - 1 - u, whose relative error stays
// below 1e-6 in float; beyond, the closed form has lost less than 1e-5 to cancellation.
constexpr double kNear = 0.125;
__device__ __forceinline__ float series(float u) {
  return ((u * (1.0f / 120) + 1.0f / 24) * u + 1.0f / 6) * u + 0.5f;
}
__device__ __forceinline__ double series(double u) { return exp_remainder(u); }

// Sums for one direction of the divergence of a tile, weights q: of q u and of q (e^u - 1 - u),
// with p = q e^u.
template <typename acc_t>
struct KlSums {
  acc_t ratio = 0, remainder = 0;

  __device__ __forceinline__ void add(acc_t q, acc_t p, acc_t u) {
    // A weight of 0 leaves p alone; its u may be infinite.
    const acc_t moved = q > acc_t(0) ? q * u : acc_t(0);
    ratio += moved;
    // Both forms, then a choice: a branch for each entry would cost more than the form not taken.
    const acc_t near = moved * (u * series(u)), far = p - q - moved;
    remainder += std::fabs(u) < acc_t(kNear) ? near : far;
  }
};

// The divergences of one tile, in the directions asked for, with the sums of both distributions.
template <int kDirections, bool kEntropy, typename acc_t, int n>
__device__ __forceinline__ KlState<acc_t> kl_tile(const acc_t (&x)[n], const acc_t (&r)[n],
                                                  acc_t scale) {
  const acc_t top_p = anchor_of(x), top_q = anchor_of(r), to_log2 = scale * acc_t(kLog2E);
  acc_t sum_p = 0, sum_q = 0, weighted = 0;
  KlSums<acc_t> forward, reverse;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const acc_t from_p = x[i] - top_p, from_q = r[i] - top_q, log2_p = from_p * to_log2;
    const acc_t p = exp2_of(log2_p), q = exp2_of(from_q * to_log2);
    // Both from their maxima, so an offset between the two logits has left before they meet.
    const acc_t u = (from_p - from_q) * scale;
    sum_p += p;
    sum_q += q;
    if (kEntropy) weighted += p * max(log2_p, acc_t(-kHuge));
    if (kDirections & kForwardKl) forward.add(q, p, u);
    if (kDirections & kReverseKl) reverse.add(p, q, -u);
  }
  KlState<acc_t> state;
  state.policy = {top_p, sum_p, weighted * acc_t(kLn2)};
  state.reference = {top_q, sum_q, 0};
  if (kDirections & kForwardKl) {
    const TileKl<acc_t> kl = tile_kl(sum_q, sum_p, forward.ratio, forward.remainder);
    state.forward = kl.divergence;
    state.log_ratio = kl.log_ratio;
  }
  if (kDirections & kReverseKl) {
    const TileKl<acc_t> kl = tile_kl(sum_p, sum_q, reverse.ratio, reverse.remainder);
    state.reverse = kl.divergence;
    if (!(kDirections & kForwardKl)) state.log_ratio = -kl.log_ratio;
  }
  return state;
}

}  // namespace
}  // namespace tokcore
