// Fronts of the alignment operators: what is wrong with values is said before anything is
// allocated, and items are shared out among the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/lattice_call.h"
#include "cpu/primitives/lattice_rows.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

// body(item) for every item, about `cells` entries of work each.
template <typename Body>
void for_each_item(const LatticeCall& call, int64_t cells, const Body& body) {
  constexpr int64_t kWorthAThread = 8192;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cells));
  if (call.batch > 0) torch::stable::parallel_for(0, call.batch, grain, body);
}

template <typename In>
bool all_usable(const In* values, int64_t count, In forbidden, In largest) {
  int unusable = 0;
  for (int64_t i = 0; i < count; ++i) unusable |= int(!is_usable(values[i], forbidden, largest));
  return unusable == 0;
}

// The first item that holds a value which is neither usable nor forbidden, or -1.
template <typename T, typename In>
int64_t first_unusable(const LatticeCall& call, double forbidden) {
  const Lattices<In> p = call.lattices<In>();
  std::atomic<int64_t> first{call.batch};
  for_each_item(call, p.rows * p.columns, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end && item < first; ++item) {
      const int64_t rows = p.rows_of(item), columns = p.columns_of(item);
      const In largest = largest_value<T, In>(rows, columns);
      bool usable = true;
      for (int64_t row = 0; row < rows; ++row)
        usable &= all_usable(p.of(item) + row * p.columns, columns, In(forbidden), largest);
      if (usable) continue;
      int64_t known = first;
      while (item < known && !first.compare_exchange_weak(known, item)) {
      }
    }
  });
  return first < call.batch ? int64_t(first) : -1;
}

template <typename T, typename In>
In unusable_value(const Lattices<In>& p, int64_t item, double forbidden) {
  const int64_t rows = p.rows_of(item), columns = p.columns_of(item);
  const In largest = largest_value<T, In>(rows, columns);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      const In value = p.of(item)[row * p.columns + column];
      if (!is_usable(value, In(forbidden), largest)) return value;
    }
  return 0;
}

inline void check_lengths(const char* op, const LatticeCall& call) {
  const Lattices<float> p = call.sizes();
  for (int64_t item = 0; item < call.batch; ++item)
    check(p.fits(item), op, "row_lengths and column_lengths must be in [0, ", call.rows,
          "] and [0, ", call.columns, "], got ", p.rows_of(item), " and ", p.columns_of(item),
          " in item ", item);
}

// Lengths in range, and values finite (and small enough for their sums) or `forbidden`.
inline void check_values(const char* op, const char* name, const LatticeCall& call,
                         double forbidden) {
  check_lengths(op, call);
  call.dispatch([&](auto in, auto sum) {
    using In = decltype(in);
    using T = decltype(sum);
    const int64_t item = first_unusable<T, In>(call, forbidden);
    if (item < 0) return;
    const Lattices<In> p = call.lattices<In>();
    check(false, op, name, " must be finite or ", forbidden, " and at most ",
          largest_value<T, In>(p.rows_of(item), p.columns_of(item)), " in size, got ",
          unusable_value<T>(p, item, forbidden), " in item ", item);
  });
}

inline float run_sweep(const LatticeRows& rows, const LatticeSweep<float, float>& p) {
  return rows.of_float(p);
}
inline double run_sweep(const LatticeRows& rows, const LatticeSweep<float, double>& p) {
  return rows.of_float_in_double(p);
}
inline double run_sweep(const LatticeRows& rows, const LatticeSweep<double, double>& p) {
  return rows.of_double(p);
}

// put(item, sum, moves) for every item; one without a cell has the worst sum.
template <typename Rule, typename T, typename In, typename Put>
void sweep_items(const LatticeCall& call, const Lattices<In>& p, const LatticeRows& rows,
                 const Put& put) {
  for_each_item(call, p.rows * p.columns, [&](int64_t begin, int64_t end) {
    std::vector<T> above(p.columns);
    std::vector<uint8_t> moves;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t m = p.rows_of(item), n = p.columns_of(item);
      T sum = m + n == 0 ? T(0) : Rule::template kWorst<T>;
      if (m > 0 && n > 0) {
        const int64_t width = band_width<Rule>(m, n), stride = p.columns + Rule::kShift;
        const int64_t needed = move_count(m, width, rows.strip);
        if (int64_t(moves.size()) < needed) moves.resize(needed);
        sum = run_sweep(
            rows, LatticeSweep<In, T>{p.of(item), stride, m, width, above.data(), moves.data()});
      }
      put(item, sum, moves.data());
    }
  });
}

}  // namespace
}  // namespace tokcore
