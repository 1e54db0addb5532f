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

// The sums of two sides against the greater of their maxima: one exponential, as one side stays.
template <typename acc_t>
struct Joined {
  acc_t max, sum_a, sum_b, weighted;
};
template <typename acc_t>
TOKCORE_HOST_DEVICE Joined<acc_t> join(const SoftmaxSum<acc_t>& a, const SoftmaxSum<acc_t>& b,
                                       acc_t scale) {
  // A side without mass has no say in the maximum.
  const acc_t max_a = a.sum == acc_t(0) ? b.max : a.max, max_b = b.sum == acc_t(0) ? a.max : b.max;
  const bool a_stays = max_a >= max_b;
  const SoftmaxSum<acc_t> moving = a_stays ? b : a, staying = a_stays ? a : b;
  const acc_t max = a_stays ? max_a : max_b, shift = ((a_stays ? max_b : max_a) - max) * scale;
  const acc_t factor = moving.sum == acc_t(0) ? acc_t(0) : std::exp(shift);
  const acc_t sum = moving.sum * factor;
  // factor 0 with shift -inf would make 0 * inf; a NaN shift has to stay NaN
  const acc_t weighted =
      factor == acc_t(0) ? acc_t(0) : factor * (moving.weighted + moving.sum * shift);
  return {max, a_stays ? staying.sum : sum, a_stays ? sum : staying.sum,
          staying.weighted + weighted};
}

template <typename acc_t>
TOKCORE_HOST_DEVICE SoftmaxSum<acc_t> merge(const SoftmaxSum<acc_t>& a, const SoftmaxSum<acc_t>& b,
                                            acc_t scale) {
  const Joined<acc_t> j = join(a, b, scale);
  return {j.max, j.sum_a + j.sum_b, j.weighted};
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
  constexpr double kInverseFactorial[] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  constexpr int kLast = sizeof(acc_t) == sizeof(double) ? 11 : 6;
  acc_t r = acc_t(kInverseFactorial[kLast]);
  for (int n = kLast - 1; n >= 0; --n) r = r * u + acc_t(kInverseFactorial[n]);
  return r;
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
  // log(policy.sum / reference.sum), but as precise as the differences it is made of. Each sum is
  // relative to its own maximum, so a common offset between the two logits never enters.
  acc_t log_ratio = 0;
  acc_t forward = 0;  // KL(reference || policy) of the distributions restricted to the entries seen
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
  // A tile in which one of them has no mass has no divergence of its own, only a log-ratio: the
  // merge makes of it what it is worth.
  if (sum_q == acc_t(0) || sum_p == acc_t(0)) return {acc_t(0), std::log(sum_p / sum_q)};
  const acc_t per_q = acc_t(1) / sum_q, y = (ratio + remainder) * per_q;
  const bool near = std::fabs(y) < acc_t(0.5);
  const acc_t log_ratio = near ? std::log1p(y) : std::log(sum_p * per_q);
  const acc_t divergence = near ? remainder * per_q - (y - log_ratio) : log_ratio - ratio * per_q;
  // Jensen: the exact value is >= 0; what is below is the rounding of two nearly equal terms. NaN
  // must pass.
  return {divergence < acc_t(0) ? acc_t(0) : divergence, log_ratio};
}

template <typename acc_t>
TOKCORE_HOST_DEVICE KlState<acc_t> merge(const KlState<acc_t>& a, const KlState<acc_t>& b,
                                         acc_t scale) {
  if (b.policy.sum == acc_t(0) && b.reference.sum == acc_t(0)) return a;
  if (a.policy.sum == acc_t(0) && a.reference.sum == acc_t(0)) return b;
  const Joined<acc_t> p = join(a.policy, b.policy, scale),
                      q = join(a.reference, b.reference, scale);
  KlState<acc_t> out;
  out.policy = {p.max, p.sum_a + p.sum_b, p.weighted};
  out.reference = {q.max, q.sum_a + q.sum_b, q.weighted};
  if (out.policy.sum == acc_t(0) || out.reference.sum == acc_t(0)) {
    // A distribution without mass so far: no divergence is defined yet.
    out.log_ratio = std::log(out.policy.sum / out.reference.sum);
    return out;
  }
  // The shares of the two sides in each distribution.
  const acc_t per_p = acc_t(1) / out.policy.sum, per_q = acc_t(1) / out.reference.sum;
  const acc_t p_a = p.sum_a * per_p, p_b = p.sum_b * per_p;
  const acc_t q_a = q.sum_a * per_q, q_b = q.sum_b * per_q;
  // The log-ratios of the two sides relative to the maxima of the whole. Maxima of one tensor are
  // subtracted from each other, never from those of the other.
  const acc_t ratio_a = a.log_ratio + ((a.policy.max - p.max) - (a.reference.max - q.max)) * scale;
  const acc_t ratio_b = b.log_ratio + ((b.policy.max - p.max) - (b.reference.max - q.max)) * scale;
  const acc_t step = ratio_b - ratio_a;
  // Near each other they are averaged as differences; far apart (or infinite) the plain form has
  // nothing to lose.
  out.log_ratio = std::fabs(step) < acc_t(0.5) ? ratio_a + std::log1p(q_b * std::expm1(step))
                                               : std::log(out.policy.sum * per_q);
  const acc_t u_a = ratio_a - out.log_ratio, u_b = ratio_b - out.log_ratio;
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
