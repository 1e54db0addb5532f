// Dynamic time warping of a batch of cost matrices, with the path: a block an item.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/dtw.h"
#include "common/namespace.h"
#include "cuda/primitives/lattice.cuh"

namespace tokcore {
namespace {

template <typename In, typename T>
__global__ void __launch_bounds__(kMaxThreads) dtw_kernel(LatticeParams<DtwTensors<In, T>, T> p) {
  run_lattices<Warping>(p);
}

std::tuple<Tensor, Tensor, Tensor> dtw_cuda(const Tensor& cost,
                                            const std::optional<Tensor>& row_lengths,
                                            const std::optional<Tensor>& column_lengths,
                                            bool wide) {
  const LatticeCall call = checked_lattice("dtw", "cost", cost, row_lengths, column_lengths, wide);
  const DeviceGuard guard(device_index(cost));
  const Shape items = {call.batch};
  Tensor least = allocate_output(cost, items, call.sum_type());
  Tensor path = allocate_output(cost, {call.batch, call.steps(), 2}, ScalarType::Int);
  Tensor path_length = allocate_output(cost, items, ScalarType::Int);
  call.dispatch([&](auto in, auto sum) {
    using In = decltype(in);
    using T = decltype(sum);
    launch_lattices<Warping>(call,
                             {call.lattices<In>(), data_of<T>(least), data_of<int32_t>(path),
                              data_of<int32_t>(path_length)},
                             dtw_kernel<In, T>);
  });
  return {least, path, path_length};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("dtw", TORCH_BOX(&tokcore::dtw_cuda));
}
