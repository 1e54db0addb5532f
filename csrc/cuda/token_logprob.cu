// Log-probabilities of given tokens and the entropy, from one read of the logits, and their
// gradient from one more.
//
// A block takes a row. The forward leaves (maximum, log-sum) behind, from which the backward
// recomputes every probability: nothing of the size of the logits is written but the gradient, and
// that may be the logits themselves.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "common/namespace.h"
#include "common/rows.h"
#include "cuda/launch.h"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/vocabulary.cuh"

namespace tokcore {
namespace {

// What both passes know of their input.
template <typename T>
struct TokenLogprobInput {
  const T* logits;
  RowIndex logits_rows;
  int64_t rows, vocabulary, targets_per_row, ignore_index;
  const int64_t* target;
  const float* row_temperature;  // null: `scale` is 1 / T of every row
  Acc<T> scale, softcap;
};

template <typename T>
struct TokenLogprobForward {
  TokenLogprobInput<T> in;
  Acc<T>*logprob, *entropy, *stats;  // entropy null: not wanted
};

template <typename T>
struct TokenLogprobBackward {
  TokenLogprobInput<T> in;
  const Acc<T>*grad_logprob, *grad_entropy, *entropy;  // null: absent
  const Acc<T>* stats;
  T* gradient;  // may be the logits
  RowIndex gradient_rows;
};

// A logit after the softcap, and the derivative of that.
template <typename acc_t>
struct Capped {
  acc_t x, slope;
};
template <bool kSoftcap, typename acc_t>
__device__ __forceinline__ Capped<acc_t> after_softcap(acc_t x, acc_t softcap) {
  if (!kSoftcap) return {x, acc_t(1)};
  const acc_t t = std::tanh(x / softcap);
  return {softcap * t, (acc_t(1) - t) * (acc_t(1) + t)};
}

// What the targets of a row say about it, before any of its vocabulary is read. Every thread reads
// all of them, so that a block agrees without a barrier.
struct RowTargets {
  bool kept = false, valid = true;
};
template <typename T>
__device__ __forceinline__ RowTargets inspect(const TokenLogprobInput<T>& in,
                                              const int64_t* target) {
  RowTargets targets;
  for (int64_t k = 0; k < in.targets_per_row; ++k) {
    if (target[k] == in.ignore_index) continue;
    targets.kept = true;
    targets.valid = targets.valid && target[k] >= 0 && target[k] < in.vocabulary;
  }
  return targets;
}

template <bool kSoftcap, bool kEntropy, typename T>
__device__ __forceinline__ SoftmaxSum<Acc<T>> sweep_row(const T* row, int64_t size, Acc<T> scale,
                                                        Acc<T> softcap) {
  SoftmaxSum<Acc<T>> state;
  const Columns columns = fixed_columns<T>();
  constexpr int kPacks = kForwardEntries<T> / Pack<T>::kSize;
  for (int64_t column = columns.first; column < size; column += kPacks * columns.stride) {
    Acc<T> x[kForwardEntries<T>];
    load_tile(row, column, columns.stride, size, x);
    if (kSoftcap) {
#pragma unroll
      for (int i = 0; i < kForwardEntries<T>; ++i) {
        // The softcap would make entries of what stands for no entry.
        const int64_t j = column + i / Pack<T>::kSize * columns.stride + i % Pack<T>::kSize;
        x[i] = j < size ? after_softcap<kSoftcap>(x[i], softcap).x : -kInfinity<Acc<T>>;
      }
    }
    state = merge(state, softmax_tile<kEntropy>(x, scale), scale);
  }
  return block_merge(state, scale);
}

template <typename T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    token_logprob_kernel(TokenLogprobForward<T> p) {
  const TokenLogprobInput<T>& in = p.in;
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const int64_t* target = in.target + row * in.targets_per_row;
    Acc<T>* logprob = p.logprob + row * in.targets_per_row;
    Acc<T>* stats = p.stats + 2 * row;
    const RowTargets targets = inspect(in, target);
    if (!targets.kept || !targets.valid) {
      const Acc<T> value = targets.valid ? Acc<T>(0) : kNaN<Acc<T>>;
      for (int64_t k = threadIdx.x; k < in.targets_per_row; k += blockDim.x) logprob[k] = value;
      if (threadIdx.x == 0) {
        stats[0] = stats[1] = value;
        if (kEntropy) p.entropy[row] = value;
      }
      continue;
    }
    const T* logits = in.logits + in.logits_rows.offset(row);
    const Acc<T> scale = scale_of(in.row_temperature, in.scale, row);
    const SoftmaxSum<Acc<T>> state =
        sweep_row<kSoftcap, kEntropy>(logits, in.vocabulary, scale, in.softcap);
    const Distribution<Acc<T>> distribution = {state.max, log_sum(state), scale};
    if (threadIdx.x == 0) {
      stats[0] = distribution.max;
      stats[1] = distribution.logsum;
      if (kEntropy) p.entropy[row] = entropy(state);
    }
    for (int64_t k = threadIdx.x; k < in.targets_per_row; k += blockDim.x) {
      if (target[k] == in.ignore_index) {
        logprob[k] = 0;
      } else {
        const Acc<T> logit = Acc<T>(logits[target[k]]);
        logprob[k] = distribution.log_probability(after_softcap<kSoftcap>(logit, in.softcap).x);
      }
    }
  }
}

// The gradient of one row: with z = x' / T and H the entropy,
//   dz_j = p_j (-sum_k g_k - g_H (log p_j + H)) + sum_{k: y_k = j} g_k,
// times 1 / T and the slope of the softcap. A row whose upstream gradients are all 0 is not live:
// it is not read.
template <bool kSoftcap, typename acc_t>
struct TokenLogprobRow {
  Distribution<acc_t> distribution;
  acc_t softcap;
  bool live = false;
  acc_t weight = 0, log_weight = 0;  // of p_j and of p_j log p_j

  __device__ __forceinline__ acc_t operator()(acc_t logit, acc_t at_label = 0) const {
    const Capped<acc_t> capped = after_softcap<kSoftcap>(logit, softcap);
    const acc_t log_p = distribution.log_probability(capped.x);
    const acc_t factor = weight + log_weight * max(log_p, acc_t(-kHuge));
    return distribution.scale * capped.slope * (probability(log_p) * factor + at_label);
  }
};

template <bool kSoftcap, typename T>
__device__ __forceinline__ TokenLogprobRow<kSoftcap, Acc<T>> gradient_of(
    const TokenLogprobBackward<T>& p, int64_t row) {
  const TokenLogprobInput<T>& in = p.in;
  const Acc<T> scale = scale_of(in.row_temperature, in.scale, row);
  TokenLogprobRow<kSoftcap, Acc<T>> gradient = {{p.stats[2 * row], p.stats[2 * row + 1], scale},
                                                in.softcap};
  if (p.grad_logprob != nullptr) {
    for (int64_t k = row * in.targets_per_row; k < (row + 1) * in.targets_per_row; ++k) {
      if (in.target[k] == in.ignore_index) continue;
      gradient.weight -= p.grad_logprob[k];
      gradient.live = gradient.live || p.grad_logprob[k] != Acc<T>(0);
    }
  }
  if (p.grad_entropy != nullptr && p.grad_entropy[row] != Acc<T>(0)) {
    gradient.weight -= p.grad_entropy[row] * p.entropy[row];
    gradient.log_weight = -p.grad_entropy[row];
    gradient.live = true;
  }
  return gradient;
}

template <typename T, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    token_logprob_backward_kernel(TokenLogprobBackward<T> p) {
  const TokenLogprobInput<T>& in = p.in;
  const int64_t labels = p.grad_logprob == nullptr ? 0 : in.targets_per_row;
  const Shared<Acc<T>> at_label = dynamic_shared<Acc<T>>(labels);
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const int64_t* target = in.target + row * in.targets_per_row;
    const T* logits = in.logits + in.logits_rows.offset(row);
    T* out = p.gradient + p.gradient_rows.offset(row);
    const RowTargets targets = inspect(in, target);
    const auto gradient = gradient_of<kSoftcap>(p, row);
    if (!targets.kept || !targets.valid || !gradient.live) {
      fill_row(out, in.vocabulary, targets.valid || !gradient.live ? Acc<T>(0) : kNaN<Acc<T>>);
      continue;
    }
    // The entries at labels are formed apart, before they are rounded. Targets that name the same
    // one all find its sum.
    for (int64_t k = threadIdx.x; k < labels; k += blockDim.x) {
      if (target[k] == in.ignore_index) continue;
      Acc<T> total = 0;
      for (int64_t l = 0; l < labels; ++l) {
        if (target[l] == target[k]) total += p.grad_logprob[row * labels + l];
      }
      at_label[k] = gradient(Acc<T>(logits[target[k]]), total);
    }
    // `out` may be the logits, of which the entries at labels have been read now.
    __syncthreads();
    const Columns columns = aligned_columns(out);
    constexpr int kPacks = kBackwardEntries<T> / Pack<T>::kSize;
    for (int64_t column = columns.first; column < in.vocabulary;
         column += kPacks * columns.stride) {
      Acc<T> x[kBackwardEntries<T>];
      load_tile(logits, column, columns.stride, in.vocabulary, x);
#pragma unroll
      for (Acc<T>& entry : x) entry = gradient(entry);
      store_tile(out, column, columns.stride, in.vocabulary, x);
    }
    // The sweep wrote the entries at labels too, and not by the threads that write them now.
    __syncthreads();
    for (int64_t k = threadIdx.x; k < labels; k += blockDim.x) {
      if (target[k] != in.ignore_index) out[target[k]] = T(Acc<T>(at_label[k]));
    }
  }
}

// What the operators of this file are called with, checked before anything is allocated.
struct TokenLogprobCall {
  const char* op;
  Tensor logits;
  Target target;
  std::optional<Tensor> row_temperature;
  double temperature, softcap;
  int64_t ignore_index;
  Shape rows;

  template <typename T>
  TokenLogprobInput<T> input() const {
    return {static_cast<const T*>(logits.const_data_ptr()),
            row_index(op, logits),
            count(rows),
            logits.size(-1),
            target.per_row,
            ignore_index,
            static_cast<const int64_t*>(target.ids.const_data_ptr()),
            data_or_null<float>(row_temperature),
            Acc<T>(1 / temperature),
            Acc<T>(softcap)};
  }
  template <typename T, typename Params>
  void launch_rows(void (*kernel)(Params), const Params& params, size_t shared_bytes = 0) const {
    launch(dim3(block_count(params.in.rows)), dim3(threads_of_row<T>(params.in.vocabulary)),
           shared_bytes, current_stream(logits), kernel, params);
  }
};

TokenLogprobCall checked_call(const char* op, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& row_temperature, double temperature,
                              double softcap, int64_t ignore_index) {
  check_logits(op, "logits", logits);
  const Shape rows = leading_shape(logits);
  Target ids = check_target(op, target, "logits", logits, true);
  auto temperatures =
      check_rows(op, "temperature", row_temperature, "logits", logits, ScalarType::Float, rows);
  return {op,  unit_last_stride(logits), ids, temperatures, temperature, softcap, ignore_index,
          rows};
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_cuda(const Tensor& logits, const Tensor& target,
                                                      const std::optional<Tensor>& row_temperature,
                                                      double temperature, double softcap,
                                                      int64_t ignore_index, bool with_entropy,
                                                      bool /* autograd's inplace_backward */) {
  const TokenLogprobCall call = checked_call("token_logprob", logits, target, row_temperature,
                                             temperature, softcap, ignore_index);
  const DeviceGuard guard(device_index(logits));
  const ScalarType type = statistics_type(logits);
  Tensor logprob = allocate_output(logits, shape_of(target), type);
  Tensor entropy = allocate_output(logits, with_entropy ? call.rows : Shape{0}, type);
  Tensor stats = allocate_output(logits, with_last(call.rows, 2), type);
  dispatch_logits(logits.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    TokenLogprobForward<T> p = {call.input<T>(), static_cast<Acc<T>*>(logprob.mutable_data_ptr()),
                                static_cast<Acc<T>*>(entropy.mutable_data_ptr()),
                                static_cast<Acc<T>*>(stats.mutable_data_ptr())};
    dispatch_bool(softcap != 0, [&](auto capped) {
      dispatch_bool(with_entropy, [&](auto entropy) {
        call.launch_rows<T>(
            token_logprob_kernel<T, decltype(capped)::value, decltype(entropy)::value>, p);
      });
    });
  });
  return {logprob, entropy, stats};
}

// The gradients that come in, and what the forward saved.
struct TokenLogprobSaved {
  const std::optional<Tensor>&grad_logprob, &grad_entropy;
  const Tensor &target, &entropy, &stats;
};

// Where a row's label entries wait for the sweep to end: 64 KiB at most, which every device has.
constexpr int64_t kMaxTargets = 8192;

void launch_backward(const TokenLogprobCall& call, const TokenLogprobSaved& saved, Tensor* inplace,
                     Tensor& gradient) {
  const char* op = call.op;
  const Tensor& logits = call.logits;
  const ScalarType type = statistics_type(logits);
  const auto rows_of = [&](const char* name, const std::optional<Tensor>& t, const Shape& shape) {
    return check_rows(op, name, t, "logits", logits, type, shape);
  };
  const auto grad_logprob = rows_of("grad_logprob", saved.grad_logprob, shape_of(saved.target));
  const auto grad_entropy = rows_of("grad_entropy", saved.grad_entropy, call.rows);
  const auto entropy = grad_entropy ? rows_of("entropy", saved.entropy, call.rows) : std::nullopt;
  const auto stats = rows_of("stats", saved.stats, with_last(call.rows, 2));
  check(call.target.per_row <= kMaxTargets, op, "target may have at most ", kMaxTargets,
        " entries a row in a backward on CUDA, got ", call.target.per_row);
  const DeviceGuard guard(device_index(logits));
  gradient = inplace ? *inplace : allocate_output(logits, shape_of(logits), logits.scalar_type());
  dispatch_logits(logits.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    TokenLogprobBackward<T> p = {call.input<T>(),
                                 data_or_null<Acc<T>>(grad_logprob),
                                 data_or_null<Acc<T>>(grad_entropy),
                                 data_or_null<Acc<T>>(entropy),
                                 data_or_null<Acc<T>>(stats),
                                 static_cast<T*>(gradient.mutable_data_ptr()),
                                 row_index(op, gradient)};
    const size_t shared_bytes = grad_logprob ? call.target.per_row * sizeof(Acc<T>) : 0;
    dispatch_bool(call.softcap != 0, [&](auto capped) {
      call.launch_rows<T>(token_logprob_backward_kernel<T, decltype(capped)::value>, p,
                          shared_bytes);
    });
  });
}

Tensor token_logprob_backward_cuda(const std::optional<Tensor>& grad_logprob,
                                   const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                                   const Tensor& target, const Tensor& entropy, const Tensor& stats,
                                   const std::optional<Tensor>& row_temperature, double temperature,
                                   double softcap, int64_t ignore_index) {
  const TokenLogprobCall call = checked_call("token_logprob_backward", logits, target,
                                             row_temperature, temperature, softcap, ignore_index);
  Tensor gradient;
  launch_backward(call, {grad_logprob, grad_entropy, target, entropy, stats}, nullptr, gradient);
  return gradient;
}

void token_logprob_backward_inplace_cuda(const std::optional<Tensor>& grad_logprob,
                                         const std::optional<Tensor>& grad_entropy, Tensor& logits,
                                         const Tensor& target, const Tensor& entropy,
                                         const Tensor& stats,
                                         const std::optional<Tensor>& row_temperature,
                                         double temperature, double softcap, int64_t ignore_index) {
  const TokenLogprobCall call = checked_call("token_logprob_backward_", logits, target,
                                             row_temperature, temperature, softcap, ignore_index);
  check_overwritable(call.op, "logits", logits);
  Tensor gradient;
  launch_backward(call, {grad_logprob, grad_entropy, target, entropy, stats}, &logits, gradient);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("token_logprob", TORCH_BOX(&tokcore::token_logprob_cuda));
  m.impl("token_logprob_backward", TORCH_BOX(&tokcore::token_logprob_backward_cuda));
  m.impl("token_logprob_backward_", TORCH_BOX(&tokcore::token_logprob_backward_inplace_cuda));
}
