// Dynamic time warping of a batch of cost matrices, with the path.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the sweep.
#include "cpu/primitives/lattice_rows.h"
#if defined(TOKCORE_ISA)
#include "cpu/primitives/lattice.h"
#endif

namespace tokcore {
TOKCORE_DECLARE_LEVELS(LatticeRows, dtw_rows)
}  // namespace tokcore

#if defined(TOKCORE_ISA)

namespace tokcore {
namespace TOKCORE_ISA {

extern const LatticeRows dtw_rows = rows_of_rule<Warping>();

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/dtw.h"
#include "cpu/primitives/lattice_front.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor> dtw_cpu(const Tensor& cost,
                                           const std::optional<Tensor>& row_lengths,
                                           const std::optional<Tensor>& column_lengths, bool wide) {
  const char* op = "dtw";
  const LatticeCall call = checked_lattice(op, "cost", cost, row_lengths, column_lengths, wide);
  check_values(op, "cost", call, kInfinity<double>);
  const Shape items = {call.batch};
  Tensor least = new_empty(cost, items, call.sum_type());
  Tensor path = new_empty(cost, {call.batch, call.steps(), 2}, ScalarType::Int);
  Tensor path_length = new_empty(cost, items, ScalarType::Int);
  call.dispatch([&](auto in, auto sum) {
    using T = decltype(sum);
    const DtwTensors<decltype(in), T> p = {call.lattices<decltype(in)>(), data_of<T>(least),
                                           data_of<int32_t>(path), data_of<int32_t>(path_length)};
    const LatticeRows& rows = TOKCORE_CHOSEN(dtw_rows);
    sweep_items<Warping, T>(call, p.in, rows, [&](int64_t item, T found, const uint8_t* moves) {
      p.put(item, found, moves, rows.strip);
    });
  });
  return {least, path, path_length};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) { m.impl("dtw", TORCH_BOX(&tokcore::dtw_cpu)); }

#endif
