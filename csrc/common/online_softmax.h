// The running statistics of one row, merged tile by tile: the one definition that the CPU and CUDA
// sweeps share.
//
// A SoftmaxSum is a (max, sum) pair of one distribution; a KlState holds two of them over the same
// entries together with the KL divergences of the distributions *conditioned on the entries seen so
// far*. Two states of disjoint entries merge exactly by the chain rule
//
//   KL(q || p) = sum_tiles Q_t KL(q | t || p | t)  +  KL(Q || P)          (Q, P: the tiles' masses)
//
// in which every term is non-negative, so nothing of the size of a logit is ever subtracted from
// its like: that is what keeps KL ~ 1e-6 accurate in float32, where E_q[log q] - E_q[log p] has
// lost every digit.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define TOKCORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TOKCORE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

template <typename acc_t>
struct SoftmaxSum {
  acc_t max = -std::numeric_limits<acc_t>::infinity();
  acc_t sum = 0;  // sum of e = exp((x - max) * scale); 0 exactly when every entry so far is -inf
  acc_t weighted =
      0;  // sum of e * (x - max) * scale over e > 0: the entropy is log(sum) - weighted / sum
};

// Rescales `s` to another maximum. The caller guarantees sum != 0, so max is finite (or +inf / NaN
// in a poisoned row).
template <typename acc_t>
TOKCORE_HOST_DEVICE SoftmaxSum<acc_t> rebase(const SoftmaxSum<acc_t>& s, acc_t max, acc_t scale) {
  const acc_t shift = (s.max - max) * scale;
  if (shift == acc_t(0)) return s;
  const acc_t factor = std::exp(shift);
  // factor 0 with shift -inf would make 0 * inf; a NaN shift has to stay NaN
  const acc_t moved = factor == acc_t(0) ? acc_t(0) : factor * (s.weighted + s.sum * shift);
  return {max, s.sum * factor, moved};
}

template <typename acc_t>
TOKCORE_HOST_DEVICE SoftmaxSum<acc_t> merge(const SoftmaxSum<acc_t>& a, const SoftmaxSum<acc_t>& b,
                                            acc_t scale) {
  if (b.sum == acc_t(0)) return a;
  if (a.sum == acc_t(0)) return b;
  const acc_t max = a.max > b.max ? a.max : b.max;
  const SoftmaxSum<acc_t> x = rebase(a, max, scale), y = rebase(b, max, scale);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// log of the sum relative to the maximum; NaN for a row without a finite entry, so that every
// output of that row is NaN.
template <typename acc_t>
TOKCORE_HOST_DEVICE acc_t log_sum(const SoftmaxSum<acc_t>& s) {
  return s.sum == acc_t(0) ? acc_t(NAN) : std::log(s.sum);
}

template <typename acc_t>
TOKCORE_HOST_DEVICE acc_t entropy(const SoftmaxSum<acc_t>& s) {
  return log_sum(s) - s.weighted / s.sum;
}

// (e^u - 1 - u) / u^2 = 1/2! + u/3! + u^2/4! + ... for |u| <= 1/4, where the closed form cancels;
// the first term left out is below the type's epsilon there (1/4^7 / 9! and 1/4^12 / 14!, relative
// to 1/2).
constexpr double kSmallRatio = 0.25;
template <typename acc_t>
TOKCORE_HOST_DEVICE acc_t exp_remainder(acc_t u) {
  constexpr int kLast = sizeof(acc_t) == sizeof(double) ? 13 : 8;
  acc_t r = 1;
  for (int n = kLast; n > 2; --n) r = acc_t(1) + r * u * (acc_t(1) / acc_t(n));
  return r / acc_t(2);
}

// q * (e^u - 1 - u) with p = q e^u given, never negative and right for q = 0 (the term is then p),
// u = -inf (+inf).
template <typename acc_t>
TOKCORE_HOST_DEVICE acc_t divergence_term(acc_t q, acc_t p, acc_t u) {
  if (std::fabs(u) < acc_t(kSmallRatio)) return q * u * u * exp_remainder(u);
  return q == acc_t(0) ? p : p - q - q * u;
}

template <typename acc_t>
struct KlState {
  SoftmaxSum<acc_t> policy, reference;
  acc_t gap = 0;  // log-sum-exp of the policy minus that of the reference, over the entries seen,
                  // both times scale
  acc_t forward =
      0;  // KL(reference || policy) of the two distributions restricted to the entries seen
  acc_t reverse = 0;  // KL(policy || reference)
};

// KL and log-ratio of one tile from sums anchored at the tile's maxima. With q_j = exp((r_j -
// max_r) * scale), p_j = exp((x_j - max_x) * scale), u_j = log(p_j / q_j): `ratio` = sum q u and
// `remainder` = sum q (e^u - 1 - u), so that sum p = sum q + ratio + remainder. Returns KL(q || p)
// and log(sum p / sum q).
template <typename acc_t>
struct TileKl {
  acc_t divergence, log_ratio;
};
template <typename acc_t>
TOKCORE_HOST_DEVICE TileKl<acc_t> tile_kl(acc_t sum_q, acc_t sum_p, acc_t ratio, acc_t remainder) {
  const acc_t y = (ratio + remainder) / sum_q;
  acc_t divergence, log_ratio;
  if (std::fabs(y) < acc_t(0.5)) {
    log_ratio = std::log1p(y);
    divergence = remainder / sum_q - (y - log_ratio);
  } else {
    log_ratio = std::log(sum_p / sum_q);
    divergence = log_ratio - ratio / sum_q;
  }
  // Jensen: the exact value is >= 0; what is below is the rounding of two nearly equal terms. NaN
  // must pass.
  return {divergence < acc_t(0) ? acc_t(0) : divergence, log_ratio};
}

template <typename acc_t>
TOKCORE_HOST_DEVICE KlState<acc_t> merge(const KlState<acc_t>& a, const KlState<acc_t>& b,
                                         acc_t scale) {
  if (b.policy.sum == acc_t(0) && b.reference.sum == acc_t(0)) return a;
  if (a.policy.sum == acc_t(0) && a.reference.sum == acc_t(0)) return b;
  KlState<acc_t> out;
  out.policy = merge(a.policy, b.policy, scale);
  out.reference = merge(a.reference, b.reference, scale);
  // The masses of the two sides under each distribution.
  const acc_t p_a = a.policy.sum == acc_t(0)
                        ? acc_t(0)
                        : rebase(a.policy, out.policy.max, scale).sum / out.policy.sum;
  const acc_t p_b = b.policy.sum == acc_t(0)
                        ? acc_t(0)
                        : rebase(b.policy, out.policy.max, scale).sum / out.policy.sum;
  const acc_t q_a = a.reference.sum == acc_t(0)
                        ? acc_t(0)
                        : rebase(a.reference, out.reference.max, scale).sum / out.reference.sum;
  const acc_t q_b = b.reference.sum == acc_t(0)
                        ? acc_t(0)
                        : rebase(b.reference, out.reference.max, scale).sum / out.reference.sum;
  const acc_t step = b.gap - a.gap;
  // Near each other the gaps are averaged as differences; far apart (or infinite) the plain form
  // has nothing to lose.
  out.gap = std::fabs(step) < acc_t(0.5) ? a.gap + std::log1p(q_b * std::expm1(step))
                                         : (out.policy.max - out.reference.max) * scale +
                                               std::log(out.policy.sum / out.reference.sum);
  const acc_t u_a = a.gap - out.gap, u_b = b.gap - out.gap;
  out.forward = (q_a == acc_t(0) ? acc_t(0) : q_a * a.forward) +
                (q_b == acc_t(0) ? acc_t(0) : q_b * b.forward) + divergence_term(q_a, p_a, u_a) +
                divergence_term(q_b, p_b, u_b);
  out.reverse = (p_a == acc_t(0) ? acc_t(0) : p_a * a.reverse) +
                (p_b == acc_t(0) ? acc_t(0) : p_b * b.reverse) + divergence_term(p_a, q_a, -u_a) +
                divergence_term(p_b, q_b, -u_b);
  return out;
}

}  // namespace
}  // namespace tokcore
