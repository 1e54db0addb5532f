// Log-probabilities of given tokens and the entropy, from one read of the logits, and their
// gradient from one more.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include <cstdint>

#include "common/rows.h"
#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"

namespace tokcore {

// One row is one softmax; `rows` lists those that are read. Statistics are float, or double for
// double logits.
struct TokenLogprobParams {
  Storage storage;
  const void* logits;
  RowIndex index;
  int64_t columns, targets_per_row, ignore_index;
  const int64_t* target;
  const float* row_temperature;  // null: `temperature`
  double temperature, softcap;   // softcap 0: none
  const int64_t* rows;
  void *logprob, *entropy, *stats;  // entropy null: not wanted
  void* blocks;                     // split rows: one SoftmaxSum<double> per (listed row, block)
  // backward only
  const void *grad_logprob, *grad_entropy;  // null: absent
  void* gradient;
  RowIndex gradient_index;
  double*
      label_gradient;  // (listed rows, K): formed before the sweep, which may overwrite the logits
  int64_t segment;     // columns of one unit of work
  bool stream;
};

struct TokenLogprobRows {
  void (*forward)(const TokenLogprobParams&, int64_t begin, int64_t end);  // units: listed rows
  void (*forward_blocks)(const TokenLogprobParams&, int64_t begin,
                         int64_t end);  // units: (listed row, block)
  void (*merge_blocks)(const TokenLogprobParams&, int64_t begin,
                       int64_t end);  // units: listed rows
  void (*label_gradients)(const TokenLogprobParams&, int64_t begin,
                          int64_t end);  // units: listed rows
  void (*backward)(const TokenLogprobParams&, int64_t begin,
                   int64_t end);  // units: (listed row, segment)
};
TOKCORE_DECLARE_LEVELS(TokenLogprobRows, token_logprob_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/vocabulary.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

// cap * tanh(x / cap). The series where 1 - 2 / (e^2z + 1) would cancel.
TOKCORE_INLINE FloatVec soft_capped(FloatVec x, FloatVec cap, FloatVec inverse) {
  using V = FloatVec;
  const V z = x * inverse, z2 = z * z, magnitude = abs(z);
  V series = V::all(float(-1382.0 / 155925));
  series = fma(series, z2, V::all(float(62.0 / 2835)));
  series = fma(series, z2, V::all(float(-17.0 / 315)));
  series = fma(series, z2, V::all(float(2.0 / 15)));
  series = fma(series, z2, V::all(float(-1.0 / 3)));
  series = fma(series * z2, z, z);
  // e^-2|z| never overflows: tanh |z| = (1 - e) / (1 + e).
  const V e = exp2(magnitude * V::all(float(-2 * kLog2E)));
  const V closed = (V::all(1) - e) / (V::all(1) + e);
  const V signed_closed = select(z < V::all(0), V::all(0) - closed, closed);
  return cap * select(magnitude < V::all(float(0.25)), series, signed_closed);
}
TOKCORE_INLINE DoubleVec soft_capped(DoubleVec x, DoubleVec cap, DoubleVec inverse) {
  for (int i = 0; i < DoubleVec::kWidth; ++i)
    x.v[i] = cap.v[i] * __builtin_tanh(x.v[i] * inverse.v[i]);
  return x;
}
TOKCORE_INLINE double soft_capped(double x, double cap) { return cap * __builtin_tanh(x / cap); }

// The block of x after the softcap, in the accumulation type.
template <typename T>
TOKCORE_INLINE void cap_block(const T* x, int64_t n, double softcap, Acc<T>* out) {
  using V = Vec<T>;
  const V cap = V::all(Acc<T>(softcap)), inverse = V::all(Acc<T>(1 / softcap));
  for (int64_t j = 0; j < n; j += kUnit<T>) {
    // Entry by entry in order: the units of T and of the accumulation type may be laid out
    // differently.
    Acc<T> part[kUnit<T>];
    V a, b;
    for (int i = 0; i < kUnit<T>; ++i) part[i] = j + i < n ? to_acc(x[j + i]) : Acc<T>(0);
    load2(part, a, b);
    store_unit(out + j, n - j, false, soft_capped(a, cap, inverse), soft_capped(b, cap, inverse));
  }
}

template <typename T>
SoftmaxSum<double> block_state(const TokenLogprobParams& p, int64_t row, int64_t block) {
  const int64_t first = block * kBlockColumns, left = p.columns - first;
  const int64_t n = left < kBlockColumns ? left : kBlockColumns;
  const T* x = static_cast<const T*>(p.logits) + p.index.offset(row) + first;
  const double scale = scale_of(p, row);
  if (p.softcap != 0) {
    Acc<T> capped[kBlockColumns];
    cap_block(x, n, p.softcap, capped);
    return p.entropy ? softmax_block<true>(capped, n, scale)
                     : softmax_block<false>(capped, n, scale);
  }
  return p.entropy ? softmax_block<true>(x, n, scale) : softmax_block<false>(x, n, scale);
}

template <typename T>
void finish_row(const TokenLogprobParams& p, int64_t row, const SoftmaxSum<double>& state) {
  using S = Acc<T>;
  const double scale = scale_of(p, row), logsum = log_sum(state);
  S* stats = static_cast<S*>(p.stats) + 2 * row;
  stats[0] = S(state.max);
  stats[1] = S(logsum);
  if (p.entropy) static_cast<S*>(p.entropy)[row] = S(entropy(state));
  const T* x = static_cast<const T*>(p.logits) + p.index.offset(row);
  for (int64_t k = row * p.targets_per_row; k < (row + 1) * p.targets_per_row; ++k) {
    const int64_t label = p.target[k];
    double value = 0;
    if (label != p.ignore_index) {
      const double entry = to_acc(x[label]);
      value =
          ((p.softcap != 0 ? soft_capped(entry, p.softcap) : entry) - state.max) * scale - logsum;
    }
    static_cast<S*>(p.logprob)[k] = S(value);
  }
}

template <typename T>
struct TokenLogprobOp {
  using State = SoftmaxSum<double>;
  TOKCORE_INLINE State block(const TokenLogprobParams& p, int64_t row, int64_t block) {
    return block_state<T>(p, row, block);
  }
  TOKCORE_INLINE void finish(const TokenLogprobParams& p, int64_t row, const State& state) {
    finish_row<T>(p, row, state);
  }
};

// What one row's gradient needs: with z = x / T and p = exp((x - max) / T - logsum),
// d z_j = p_j (-sum_k g_k - g_H (log p_j + H)) + sum_{k: y_k = j} g_k, times 1 / T and the
// softcap's derivative.
struct RowGradient {
  double scale, max, logsum, sum, entropy_gradient, entropy;
};

template <typename T>
TOKCORE_INLINE RowGradient row_gradient(const TokenLogprobParams& p, int64_t row) {
  using S = Acc<T>;
  const S* stats = static_cast<const S*>(p.stats) + 2 * row;
  RowGradient g = {scale_of(p, row), stats[0], stats[1], 0, 0, 0};
  for (int64_t k = row * p.targets_per_row; p.grad_logprob && k < (row + 1) * p.targets_per_row;
       ++k)
    if (p.target[k] != p.ignore_index) g.sum += static_cast<const S*>(p.grad_logprob)[k];
  if (p.grad_entropy) {
    g.entropy_gradient = static_cast<const S*>(p.grad_entropy)[row];
    g.entropy = static_cast<const S*>(p.entropy)[row];
  }
  return g;
}

// The label's entry is formed here, in double: read back from a rounded sweep, p - 1 would lose its
// digits.
template <typename T>
void label_gradients(const TokenLogprobParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.rows[i], first = row * p.targets_per_row;
    const RowGradient g = row_gradient<T>(p, row);
    const T* x = static_cast<const T*>(p.logits) + p.index.offset(row);
    for (int64_t k = 0; k < p.targets_per_row && p.grad_logprob; ++k) {
      const int64_t label = p.target[first + k];
      if (label == p.ignore_index) continue;
      double at_label = 0;  // several targets may name one entry
      for (int64_t l = 0; l < p.targets_per_row; ++l)
        if (p.target[first + l] == label)
          at_label += static_cast<const Acc<T>*>(p.grad_logprob)[first + l];
      const double entry = to_acc(x[label]),
                   capped = p.softcap != 0 ? soft_capped(entry, p.softcap) : entry;
      const double slope = p.softcap != 0 ? 1 - (capped / p.softcap) * (capped / p.softcap) : 1;
      const double logprob = (capped - g.max) * g.scale - g.logsum,
                   probability = __builtin_exp(logprob);
      double coefficient = -g.sum;
      if (g.entropy_gradient != 0 && probability > 0)
        coefficient -= g.entropy_gradient * (logprob + g.entropy);
      p.label_gradient[i * p.targets_per_row + k] =
          g.scale * slope * (probability * coefficient + at_label);
    }
  }
}

// Compiled apart for the plain case, which is limited by how fast exponentials come.
template <bool kSoftcap, bool kEntropy, typename T>
TOKCORE_INLINE void sweep_gradient(const TokenLogprobParams& p, const RowGradient& g, const T* x,
                                   T* out, int64_t n) {
  using V = Vec<T>;
  using S = Acc<T>;
  const V max = V::all(S(g.max)), to_log2 = V::all(S(g.scale * kLog2E)),
          logsum2 = V::all(S(g.logsum * kLog2E));
  const V sum = V::all(S(-g.sum * g.scale));
  const V entropy_gradient = V::all(S(-g.entropy_gradient * g.scale)),
          entropy = V::all(S(g.entropy));
  const V cap = V::all(S(p.softcap)), inverse = V::all(S(1 / p.softcap));
  const auto gradient = [&](V entry) __attribute__((always_inline)) {
    const V capped = kSoftcap ? soft_capped(entry, cap, inverse) : entry;
    const V t = fma(capped - max, to_log2, V::all(0) - logsum2);
    const V probability = exp2(t);
    V d = probability * sum;
    if (kEntropy) {
      const V weight = fma(t, V::all(S(1 / kLog2E)), entropy) * entropy_gradient;
      d = d + positive_only(probability, probability * weight);
    }
    return kSoftcap ? d * (V::all(1) - (capped * inverse) * (capped * inverse)) : d;
  };
  for_each_unit(n, out, p.stream, [&](int64_t j, int64_t left) __attribute__((always_inline)) {
    V a, b;
    load_unit(x + j, left, a, b);
    store_unit(out + j, left, p.stream, gradient(a), gradient(b));
  });
}

template <typename T>
void backward(const TokenLogprobParams& p, int64_t begin, int64_t end) {
  const int64_t segments = (p.columns + p.segment - 1) / p.segment;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit / segments, row = p.rows[i], first = unit % segments * p.segment;
    const int64_t n = p.segment < p.columns - first ? p.segment : p.columns - first;
    const RowGradient g = row_gradient<T>(p, row);
    const T* x = static_cast<const T*>(p.logits) + p.index.offset(row) + first;
    T* out = static_cast<T*>(p.gradient) + p.gradient_index.offset(row) + first;
    if (p.softcap != 0)
      sweep_gradient<true, true>(p, g, x, out, n);
    else if (g.entropy_gradient != 0)
      sweep_gradient<false, true>(p, g, x, out, n);
    else
      sweep_gradient<false, false>(p, g, x, out, n);
    if (p.stream) drain_streams();
    for (int64_t k = 0; k < p.targets_per_row && p.grad_logprob; ++k) {
      const int64_t column = p.target[row * p.targets_per_row + k] - first;
      if (p.target[row * p.targets_per_row + k] == p.ignore_index || column < 0 || column >= n)
        continue;
      from_acc(Acc<T>(p.label_gradient[i * p.targets_per_row + k]), out + column);
    }
  }
}

TOKCORE_BY_STORAGE(forward_any, TokenLogprobParams, forward_rows<TokenLogprobOp<T>>)
TOKCORE_BY_STORAGE(forward_blocks_any, TokenLogprobParams, forward_blocks<TokenLogprobOp<T>>)
TOKCORE_BY_STORAGE(merge_blocks_any, TokenLogprobParams, merge_blocks<TokenLogprobOp<T>>)
TOKCORE_BY_STORAGE(label_gradients_any, TokenLogprobParams, label_gradients<T>)
TOKCORE_BY_STORAGE(backward_any, TokenLogprobParams, backward<T>)

}  // namespace

extern const TokenLogprobRows token_logprob_rows = {
    forward_any, forward_blocks_any, merge_blocks_any, label_gradients_any, backward_any};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include "common/online_softmax.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

struct TokenLogprobCall {
  TokenLogprobParams params{};
  Tensor logits;
  Target target;
  Shape target_shape;
  std::optional<Tensor> row_temperature;
  std::vector<int64_t> kept;  // rows with something to read
  int64_t rows = 0;
};

// Everything that can be wrong is found here, before anything is allocated.
TokenLogprobCall check_call(const char* op, const Tensor& logits, const Tensor& target,
                            const std::optional<Tensor>& row_temperature, double temperature,
                            double softcap, int64_t ignore_index) {
  check_logits(op, "logits", logits);
  TokenLogprobCall call;
  call.target = check_target(op, target, "logits", logits, true);
  call.target_shape = shape_of(target);
  call.row_temperature = check_rows(op, "temperature", row_temperature, "logits", logits,
                                    ScalarType::Float, leading_shape(logits));
  call.rows = count(leading_shape(logits));
  call.kept = kept_rows(op, call.target, call.rows, logits.size(-1), ignore_index, nullptr);
  call.logits = unit_last_stride(logits);

  TokenLogprobParams& p = call.params;
  p.storage = storage_of(logits);
  p.logits = call.logits.const_data_ptr();
  p.index = row_index(op, call.logits);
  p.columns = logits.size(-1);
  p.targets_per_row = call.target.per_row;
  p.ignore_index = ignore_index;
  p.target = static_cast<const int64_t*>(call.target.ids.const_data_ptr());
  p.row_temperature = data_or_null<float>(call.row_temperature);
  p.temperature = temperature;
  p.softcap = softcap;
  p.rows = call.kept.data();
  return call;
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_cpu(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& row_temperature,
    double temperature, double softcap, int64_t ignore_index, bool with_entropy,
    bool /*inplace_backward: read by the autograd formula*/) {
  const char* op = "token_logprob";
  TokenLogprobCall call =
      check_call(op, logits, target, row_temperature, temperature, softcap, ignore_index);
  TokenLogprobParams& p = call.params;
  const ScalarType type = statistics_type(logits);
  const Shape leading = leading_shape(logits);
  // Skipped rows are exactly 0.
  Tensor logprob = new_zeros(logits, shape_of(target), type),
         stats = new_zeros(logits, with_last(leading, 2), type);
  Tensor entropy = new_zeros(logits, with_entropy ? leading : Shape{0}, type);
  p.logprob = logprob.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  p.entropy = with_entropy ? entropy.mutable_data_ptr() : nullptr;

  run_forward<SoftmaxSum<double>>(TOKCORE_CHOSEN(token_logprob_rows), p,
                                  static_cast<int64_t>(call.kept.size()));
  return {logprob, entropy, stats};
}

// Fills the gradient of every row: the logits themselves in place.
void fill_gradient(const char* op, const std::optional<Tensor>& grad_logprob,
                   const std::optional<Tensor>& grad_entropy, const Tensor& entropy,
                   const Tensor& stats, TokenLogprobCall& call, const Tensor* inplace,
                   Tensor& gradient) {
  TokenLogprobParams& p = call.params;
  const Tensor& logits = call.logits;
  const ScalarType type = statistics_type(logits);
  const Shape leading = leading_shape(logits);
  const auto values =
      check_rows(op, "grad_logprob", grad_logprob, "logits", logits, type, call.target_shape);
  const auto entropies =
      check_rows(op, "grad_entropy", grad_entropy, "logits", logits, type, leading);
  const auto saved = check_rows(op, "stats", stats, "logits", logits, type, with_last(leading, 2));
  const auto saved_entropy =
      check_rows(op, "entropy", entropies ? std::optional(entropy) : std::nullopt, "logits", logits,
                 type, leading);

  gradient = inplace ? *inplace : new_gradient(logits);
  const LiveRows live =
      live_rows(call.kept, call.rows, {{values, p.targets_per_row}, {entropies, 1}});
  std::vector<double> labels(live.live.size() * p.targets_per_row);
  p.rows = live.live.data();
  p.grad_logprob = data_or_null<void>(values);
  p.grad_entropy = data_or_null<void>(entropies);
  p.entropy = saved_entropy ? const_cast<void*>(saved_entropy->const_data_ptr()) : nullptr;
  p.stats = const_cast<void*>(saved->const_data_ptr());
  p.label_gradient = labels.data();
  p.gradient = gradient.mutable_data_ptr();
  p.gradient_index = row_index(op, gradient);
  p.stream = !inplace && worth_streaming(gradient);
  run_backward(TOKCORE_CHOSEN(token_logprob_rows), p, static_cast<int64_t>(live.live.size()));
  zero_rows(gradient, p.gradient_index, live.dead);
}

Tensor token_logprob_backward_cpu(const std::optional<Tensor>& grad_logprob,
                                  const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                                  const Tensor& target, const Tensor& entropy, const Tensor& stats,
                                  const std::optional<Tensor>& row_temperature, double temperature,
                                  double softcap, int64_t ignore_index) {
  const char* op = "token_logprob_backward";
  TokenLogprobCall call =
      check_call(op, logits, target, row_temperature, temperature, softcap, ignore_index);
  Tensor gradient;
  fill_gradient(op, grad_logprob, grad_entropy, entropy, stats, call, nullptr, gradient);
  return gradient;
}

void token_logprob_backward_inplace_cpu(const std::optional<Tensor>& grad_logprob,
                                        const std::optional<Tensor>& grad_entropy, Tensor& logits,
                                        const Tensor& target, const Tensor& entropy,
                                        const Tensor& stats,
                                        const std::optional<Tensor>& row_temperature,
                                        double temperature, double softcap, int64_t ignore_index) {
  const char* op = "token_logprob_backward_";
  TokenLogprobCall call =
      check_call(op, logits, target, row_temperature, temperature, softcap, ignore_index);
  check_overwritable(op, "logits", logits);
  Tensor gradient;
  fill_gradient(op, grad_logprob, grad_entropy, entropy, stats, call, &logits, gradient);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("token_logprob", TORCH_BOX(&tokcore::token_logprob_cpu));
  m.impl("token_logprob_backward", TORCH_BOX(&tokcore::token_logprob_backward_cpu));
  m.impl("token_logprob_backward_", TORCH_BOX(&tokcore::token_logprob_backward_inplace_cpu));
}

#endif
