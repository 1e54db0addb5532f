// The best partition of rows and columns into groups: sums, a sweep over the shorter dimension with
// vectors along the longer one, and the walk back.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the sweep.
#include "common/monotonic_align.h"

#include "cpu/primitives/isa.h"
#if defined(TOKCORE_ISA)
#include "cpu/primitives/simd.h"
#endif

namespace tokcore {

// Behind the lanes of every array: blocks of lanes may be begun before the end.
constexpr int64_t kLanePad = 64;

template <typename In, typename T>
struct AlignItem {
  const In* scores;
  int64_t lane_stride, step_stride, lanes, steps;
  T penalty;
  bool lanes_first;  // which candidates come first
  // Scratch of `stride` = lanes + 1 + 2 * kLanePad entries, index p is cell p (of a step, lane p).
  int64_t stride;
  T *above, *found;                             // cells of the step before and of this one
  T *lane_sums, *step_sums;                     // up to this step
  T *lane_counts, *lane_inverses, *lane_costs;  // of x lanes, from -kLanePad on
  int32_t *lane_least, *step_least;             // groups may begin here, after forbidden scores
  T *step_inverses, *step_costs;                // of x steps (steps + 1)
  // (blocks, steps + 1, 2, cells of a block): cells and sums of all steps, as a block reads them.
  T* history;
  int16_t* moves;  // out (lanes + steps): from the last group to the first
};

struct MonotonicAlignRows {
  int64_t (*of_float)(const AlignItem<float, float>&, float& score);
  int64_t (*of_float_in_double)(const AlignItem<float, double>&, double& score);
  int64_t (*of_double)(const AlignItem<double, double>&, double& score);
};
TOKCORE_DECLARE_LEVELS(MonotonicAlignRows, monotonic_align_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

#if defined(TOKCORE_ISA_AVX512)
constexpr int kBytes = 64;
#elif defined(TOKCORE_ISA_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kVectors = 4;  // in a block

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Values __attribute__((vector_size(kBytes)));
  typedef int32_t Number;  // as wide as a value
  typedef int32_t Index __attribute__((vector_size(kBytes)));
  typedef int16_t Moves __attribute__((vector_size(kBytes / 2)));
};
template <>
struct Lanes<double> {
  typedef double Values __attribute__((vector_size(kBytes)));
  typedef int64_t Number;
  typedef int64_t Index __attribute__((vector_size(kBytes)));
  typedef int16_t Moves __attribute__((vector_size(kBytes / 4)));
};
template <typename T>
constexpr int kLanes = kBytes / sizeof(T);

template <typename Vector, typename T>
TOKCORE_INLINE Vector load(const T* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
TOKCORE_INLINE typename Lanes<T>::Index load_index(const int32_t* from) {
  typename Lanes<T>::Index v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = from[i];
  return v;
}

// Below, what the quotient leaves over would not be exact.
template <typename T>
constexpr T kSmall = 0;
template <>
constexpr float kSmall<float> = 0x1p-60f;
template <>
constexpr double kSmall<double> = 0x1p-900;

// sum / count as a division rounds it. From the inverse: the first quotient is off by less than two
// units, what it leaves over is exact, and a quotient by an integer below 2^15 is never so near the
// middle of two numbers that the second rounding could go wrong.
template <bool kCareful, typename Values>
TOKCORE_INLINE Values quotient(Values sum, Values count, [[maybe_unused]] Values inverse) {
#if defined(TOKCORE_FUSED)
  if (!kCareful) {
    const Values near = sum * inverse;
    return fused(fused(-near, count, sum), inverse, near);
  }
#endif
  return sum / count;
}

template <typename T>
constexpr int64_t kBlock = kVectors * kLanes<T>;
template <typename In, typename T>
TOKCORE_INLINE T* history_of(const AlignItem<In, T>& p, int64_t cell, int64_t q) {
  return p.history + (cell / kBlock<T> * (p.steps + 1) + q) * 2 * kBlock<T>;
}

// Cells and sums up to step q into the history.
template <typename In, typename T>
void keep_step(const AlignItem<In, T>& p, int64_t q, const T* cells) {
  for (int64_t l = 0; l <= p.lanes; l += kBlock<T>) {
    T* to = history_of(p, l, q);
    __builtin_memcpy(to, cells + l, kBlock<T> * sizeof(T));
    __builtin_memcpy(to + kBlock<T>, p.step_sums + l, kBlock<T> * sizeof(T));
  }
}

// Sums up to step q, and where groups that end there may begin. Whether all scores are plain: none
// forbidden, none very small.
template <typename In, typename T>
bool add_step(const AlignItem<In, T>& p, int64_t q) {
  const In* scores = p.scores + (q - 1) * p.step_stride;
  bool plain = true;
  T sum = 0;
  int32_t least = 0;
  for (int64_t l = 0; l < p.lanes; ++l) {
    T score = T(scores[l * p.lane_stride]);
    plain &= score == 0 || __builtin_fabs(score) >= kSmall<T>;
    if (score == -kInfinity<T>) {
      plain = false;
      score = 0;
      least = int32_t(l + 1);
      p.step_least[l] = int32_t(q);
    }
    sum += score;
    p.step_sums[l] += score;
    p.lane_sums[l + 1] = sum;
    p.lane_least[l + 1] = least;
  }
  return plain;
}

// The cells of step q that end with the lanes [lane, lane + kBlock). kCareful: not all scores are
// plain. Which candidate it was is not kept: the walk back asks for few cells again.
template <bool kCareful, typename In, typename T>
TOKCORE_INLINE void run_block(const AlignItem<In, T>& p, int64_t q, int64_t lane) {
  using Number = typename Lanes<T>::Number;
  using Values = typename Lanes<T>::Values;
  constexpr int n = kLanes<T>;
  const Values none = Values{} - kInfinity<T>;
  Values best[kVectors], sums[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    best[v] = none;
    sums[v] = load<Values>(p.lane_sums + lane + 1 + v * n);
  }
  const int64_t end = lane + kBlock<T> < p.lanes ? lane + kBlock<T> : p.lanes;
  for (int64_t k = 0; k < end; ++k) {
    const T before = p.above[k];
    if (before == -kInfinity<T>) continue;
    const T sum = p.lane_sums[k];
    const int64_t x = lane + 1 - k;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Values mean = quotient<kCareful>(sums[v] - sum, load<Values>(p.lane_counts + x + v * n),
                                             load<Values>(p.lane_inverses + x + v * n));
      // Where the count is not positive the cost is infinite.
      Values candidate = (before + mean) - load<Values>(p.lane_costs + x + v * n);
      if (kCareful)
        candidate = Number(k) >= load_index<T>(p.lane_least + lane + 1 + v * n) ? candidate : none;
      best[v] = candidate > best[v] ? candidate : best[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) sums[v] = load<Values>(p.step_sums + lane + v * n);
  const T* before = history_of(p, lane, 0);
  for (int64_t k = 0; k < q; ++k, before += 2 * kBlock<T>) {
    const Values count = Values{} + T(q - k), inverse = Values{} + p.step_inverses[q - k];
    const T cost = p.step_costs[q - k];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Values sum = load<Values>(before + kBlock<T> + v * n);
      Values candidate =
          (load<Values>(before + v * n) + quotient<kCareful>(sums[v] - sum, count, inverse)) - cost;
      if (kCareful)
        candidate = Number(k) >= load_index<T>(p.step_least + lane + v * n) ? candidate : none;
      best[v] = candidate > best[v] ? candidate : best[v];
    }
  }
  for (int v = 0; v < kVectors; ++v)
    __builtin_memcpy(p.found + lane + 1 + v * n, &best[v], sizeof best[v]);
}

template <typename In, typename T>
TOKCORE_INLINE T score_at(const AlignItem<In, T>& p, int64_t lane, int64_t step) {
  return T(p.scores[lane * p.lane_stride + step * p.step_stride]);
}

// The longest group of lanes that makes cell (i, q) what it is, or 0.
template <typename In, typename T>
int64_t lanes_of_group(const AlignItem<In, T>& p, int64_t i, int64_t q, T best) {
  int64_t least = 0;
  T* sums = p.lane_sums;
  for (int64_t l = 0; l < i; ++l) {
    const T score = score_at(p, l, q - 1);
    if (score == -kInfinity<T>) least = l + 1;
    sums[l + 1] = score == -kInfinity<T> ? sums[l] : sums[l] + score;
  }
  for (int64_t k = least; k < i; ++k) {
    const T before = history_of(p, k, q - 1)[k % kBlock<T>];
    if ((before + (sums[i] - sums[k]) / T(i - k)) - p.lane_costs[i - k] == best) return i - k;
  }
  return 0;
}

// The longest group of steps that does, or 0.
template <typename In, typename T>
int64_t steps_of_group(const AlignItem<In, T>& p, int64_t i, int64_t q, T best) {
  int64_t least = q;
  while (least > 0 && score_at(p, i - 1, least - 1) > -kInfinity<T>) --least;
  const int64_t lane = (i - 1) % kBlock<T>;
  const T score = score_at(p, i - 1, q - 1);
  const T sum = history_of(p, i - 1, q - 1)[kBlock<T> + lane] + score;
  for (int64_t k = least; k < q; ++k) {
    const T* before = history_of(p, i - 1, k);
    if ((before[lane] + (sum - before[kBlock<T> + lane]) / T(q - k)) - p.step_costs[q - k] == best)
      return q - k;
  }
  return 0;
}

// From the last group to the first; there is one for every cell on the way.
template <typename In, typename T>
int64_t walk_back(const AlignItem<In, T>& p) {
  int64_t i = p.lanes, q = p.steps, count = 0;
  while (i > 0 && q > 0) {
    const T best = history_of(p, i, q)[i % kBlock<T>];
    int64_t lanes = p.lanes_first ? lanes_of_group(p, i, q, best) : 0;
    const int64_t steps = lanes > 0 ? 0 : steps_of_group(p, i, q, best);
    if (lanes + steps == 0) lanes = lanes_of_group(p, i, q, best);
    p.moves[count++] = int16_t(lanes > 0 ? lanes : -steps);
    i -= lanes > 0 ? lanes : 1;
    q -= lanes > 0 ? 1 : steps;
  }
  return count;
}

// The groups of the best partition, 0 where there is none; its score.
template <typename In, typename T>
int64_t align(const AlignItem<In, T>& item, T& score) {
  __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED);
  AlignItem<In, T> p = item;
  for (int64_t x = -kLanePad; x < p.lanes + kLanePad; ++x) {
    p.lane_counts[x] = x > 0 ? T(x) : T(1);
    p.lane_inverses[x] = 1 / p.lane_counts[x];
    p.lane_costs[x] = x > 0 ? length_cost(p.penalty, x, p.lanes) : kInfinity<T>;
  }
  for (int64_t x = 1; x <= p.steps; ++x) {
    p.step_inverses[x] = 1 / T(x);
    p.step_costs[x] = length_cost(p.penalty, x, p.steps);
  }
  for (int64_t l = 0; l <= p.lanes; ++l) {
    p.above[l] = -kInfinity<T>;
    p.step_sums[l] = 0;
    p.step_least[l] = 0;
  }
  p.above[0] = 0;
  p.lane_sums[0] = 0;
  keep_step(p, 0, p.above);
  bool plain = true;
  for (int64_t q = 1; q <= p.steps; ++q) {
    plain &= add_step(p, q);
    for (int64_t lane = 0; lane < p.lanes; lane += kBlock<T>)
      plain ? run_block<false>(p, q, lane) : run_block<true>(p, q, lane);
    p.found[0] = -kInfinity<T>;
    keep_step(p, q, p.found);
    T* const found = p.found;
    p.found = p.above;
    p.above = found;
  }
  score = p.above[p.lanes];
  return score > -kInfinity<T> ? walk_back(p) : 0;
}

}  // namespace

extern const MonotonicAlignRows monotonic_align_rows = {align<float, float>, align<float, double>,
                                                        align<double, double>};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/primitives/lattice_front.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

int64_t run(const AlignItem<float, float>& p, float& score) {
  return TOKCORE_CHOSEN(monotonic_align_rows).of_float(p, score);
}
int64_t run(const AlignItem<float, double>& p, double& score) {
  return TOKCORE_CHOSEN(monotonic_align_rows).of_float_in_double(p, score);
}
int64_t run(const AlignItem<double, double>& p, double& score) {
  return TOKCORE_CHOSEN(monotonic_align_rows).of_double(p, score);
}

// Scratch for items of one size and smaller, one per thread.
template <typename T>
struct AlignScratch {
  std::vector<T> sums;
  std::vector<int32_t> least;
  std::vector<int16_t> moves;

  template <typename In>
  void run_item(const AlignTensors<In, T>& p, int64_t item) {
    const int64_t m = p.in.rows_of(item), n = p.in.columns_of(item);
    const bool rows_are_lanes = p.rows_are_lanes(item);
    AlignItem<In, T> a = {};
    a.scores = p.in.of(item);
    a.lanes = rows_are_lanes ? m : n;
    a.steps = rows_are_lanes ? n : m;
    a.lane_stride = rows_are_lanes ? p.in.columns : 1;
    a.step_stride = rows_are_lanes ? 1 : p.in.columns;
    a.penalty = p.penalty;
    a.lanes_first = rows_are_lanes;
    a.stride = a.lanes + 1 + 2 * kLanePad;
    grow(sums, 7 * a.stride + 2 * (a.steps + 1) * (a.lanes + 1 + kLanePad + 1));
    grow(least, 2 * a.stride);
    grow(moves, a.lanes + a.steps);
    a.above = sums.data();
    a.found = a.above + a.stride;
    a.lane_sums = a.found + a.stride;
    a.step_sums = a.lane_sums + a.stride;
    a.lane_counts = a.step_sums + a.stride + kLanePad;
    a.lane_inverses = a.lane_counts + a.stride;
    a.lane_costs = a.lane_inverses + a.stride;
    a.step_inverses = a.lane_costs - kLanePad + a.stride;
    a.step_costs = a.step_inverses + a.steps + 1;
    a.history = a.step_costs + a.steps + 1;
    a.lane_least = least.data();
    a.step_least = a.lane_least + a.stride;
    a.moves = moves.data();
    T score;
    const int64_t count = run(a, score);
    p.put(item, score, moves.data(), count);
  }

 private:
  template <typename Element>
  static void grow(std::vector<Element>& of, int64_t size) {
    if (int64_t(of.size()) < size) of.resize(size);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> monotonic_align_cpu(
    const Tensor& scores, const std::optional<Tensor>& row_lengths,
    const std::optional<Tensor>& column_lengths, double length_penalty, bool wide) {
  const char* op = "monotonic_align";
  const LatticeCall call = checked_align(op, scores, row_lengths, column_lengths, wide);
  check_values(op, "scores", call, -kInfinity<double>);
  Tensor score = new_empty(scores, {call.batch}, call.sum_type());
  Tensor groups = new_empty(scores, {call.batch, call.steps(), 4}, ScalarType::Int);
  Tensor group_count = new_empty(scores, {call.batch}, ScalarType::Int);
  Tensor row_ranges = new_empty(scores, {call.batch, call.rows, 2}, ScalarType::Int);
  Tensor column_ranges = new_empty(scores, {call.batch, call.columns, 2}, ScalarType::Int);
  call.dispatch([&](auto in, auto sum) {
    using T = decltype(sum);
    const AlignTensors<decltype(in), T> p = {call.lattices<decltype(in)>(),
                                             T(length_penalty),
                                             data_of<T>(score),
                                             data_of<int32_t>(groups),
                                             data_of<int32_t>(group_count),
                                             data_of<int32_t>(row_ranges),
                                             data_of<int32_t>(column_ranges)};
    const int64_t candidates = call.rows * call.columns * (call.rows + call.columns) / 2;
    for_each_item(call, candidates, [&](int64_t begin, int64_t end) {
      AlignScratch<T> scratch;
      for (int64_t item = begin; item < end; ++item) {
        if (p.in.rows_of(item) > 0 && p.in.columns_of(item) > 0)
          scratch.run_item(p, item);
        else
          p.put_empty(item);
      }
    });
  });
  return {score, groups, group_count, row_ranges, column_ranges};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("monotonic_align", TORCH_BOX(&tokcore::monotonic_align_cpu));
}

#endif
