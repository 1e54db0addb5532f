// Monotonic alignment search of a batch of score matrices, with the path: a block an item.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/monotonic_search.h"
#include "common/namespace.h"
#include "cuda/primitives/lattice.cuh"

namespace tokcore {
namespace {

template <typename In, typename T>
__global__ void __launch_bounds__(kMaxThreads)
    monotonic_search_kernel(LatticeParams<SearchTensors<In, T>, T> p) {
  run_lattices<Search>(p);
}

std::tuple<Tensor, Tensor, Tensor> monotonic_search_cuda(
    const Tensor& scores, const std::optional<Tensor>& row_lengths,
    const std::optional<Tensor>& column_lengths, bool wide) {
  const LatticeCall call =
      checked_lattice("monotonic_search", "scores", scores, row_lengths, column_lengths, wide);
  const DeviceGuard guard(device_index(scores));
  Tensor greatest = allocate_output(scores, {call.batch}, call.sum_type());
  Tensor rows = allocate_output(scores, {call.batch, call.columns}, ScalarType::Int);
  Tensor durations = allocate_output(scores, {call.batch, call.rows}, ScalarType::Int);
  call.dispatch([&](auto in, auto sum) {
    using In = decltype(in);
    using T = decltype(sum);
    launch_lattices<Search>(call,
                            {call.lattices<In>(), data_of<T>(greatest), data_of<int32_t>(rows),
                             data_of<int32_t>(durations)},
                            monotonic_search_kernel<In, T>);
  });
  return {greatest, rows, durations};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("monotonic_search", TORCH_BOX(&tokcore::monotonic_search_cuda));
}
