// Monotonic alignment search of a batch of score matrices, with the path.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the sweep.
#include "cpu/primitives/lattice_rows.h"
#if defined(TOKCORE_ISA)
#include "cpu/primitives/lattice.h"
#endif

namespace tokcore {
TOKCORE_DECLARE_LEVELS(LatticeRows, monotonic_search_rows)
}  // namespace tokcore

#if defined(TOKCORE_ISA)

namespace tokcore {
namespace TOKCORE_ISA {

extern const LatticeRows monotonic_search_rows = rows_of_rule<Search>();

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/monotonic_search.h"
#include "cpu/primitives/lattice_front.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor> monotonic_search_cpu(const Tensor& scores,
                                                        const std::optional<Tensor>& row_lengths,
                                                        const std::optional<Tensor>& column_lengths,
                                                        bool wide) {
  const char* op = "monotonic_search";
  const LatticeCall call = checked_lattice(op, "scores", scores, row_lengths, column_lengths, wide);
  check_values(op, "scores", call, -kInfinity<double>);
  const Lattices<float> sizes = call.sizes();
  for (int64_t item = 0; item < call.batch; ++item)
    check(sizes.rows_of(item) <= sizes.columns_of(item), op,
          "scores must have at least as many columns as rows, or no row can get one of its own: "
          "got ",
          sizes.rows_of(item), " rows and ", sizes.columns_of(item), " columns in item ", item);
  Tensor greatest = new_empty(scores, {call.batch}, call.sum_type());
  Tensor row_of = new_empty(scores, {call.batch, call.columns}, ScalarType::Int);
  Tensor durations = new_empty(scores, {call.batch, call.rows}, ScalarType::Int);
  call.dispatch([&](auto in, auto sum) {
    using T = decltype(sum);
    const SearchTensors<decltype(in), T> p = {call.lattices<decltype(in)>(), data_of<T>(greatest),
                                              data_of<int32_t>(row_of),
                                              data_of<int32_t>(durations)};
    const LatticeRows& rows = TOKCORE_CHOSEN(monotonic_search_rows);
    sweep_items<Search, T>(call, p.in, rows, [&](int64_t item, T found, const uint8_t* moves) {
      p.put(item, found, moves, rows.strip);
    });
  });
  return {greatest, row_of, durations};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("monotonic_search", TORCH_BOX(&tokcore::monotonic_search_cpu));
}

#endif
