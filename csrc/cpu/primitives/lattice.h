// The best monotone path through a matrix, kStrip rows at a time: each row is a column behind the
// one above it, so that kStrip cells do not wait for each other. Rows only.
#pragma once

#include "common/lattice.h"
#include "cpu/primitives/lattice_rows.h"
#include "cpu/primitives/simd.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

constexpr int64_t kStrip = 4;

// What a strip knows between its steps, each row at its own column.
template <typename In, typename T>
struct Strip {
  const In* row[kStrip];
  T left[kStrip], diagonal[kStrip];
};

// Step s of the rows [begin, end) of a strip: row l is at column s - l.
template <typename Rule, typename In, typename T>
TOKCORE_INLINE void step_strip(Strip<In, T>& strip, int64_t s, int64_t begin, int64_t end, T* above,
                               uint8_t* moves) {
  uint8_t found[kStrip] = {};
  // From the last row up: the row above has the value of the step before still.
#pragma GCC unroll 8
  for (int64_t l = kStrip - 1; l >= 0; --l) {
    if (l < begin || l >= end) continue;
    const T up = l == 0 ? above[s] : strip.left[l == 0 ? 0 : l - 1];
    const T value = Rule::template cell<T>(T(strip.row[l][s - l]), strip.diagonal[l], up,
                                           strip.left[l], found[l]);
    strip.diagonal[l] = up;
    strip.left[l] = value;
    if (l == kStrip - 1) above[s - l] = value;
  }
  std::memcpy(moves + s * kStrip, found, kStrip);  // one store
}

template <typename Rule, typename In, typename T>
T sweep_lattice(const LatticeSweep<In, T>& p) {
  __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED);
  constexpr T kWorst = Rule::template kWorst<T>;
  const int64_t rows = p.rows, columns = p.columns, steps = columns + kStrip - 1;
  T* const above = p.above;
  for (int64_t j = 0; j < columns; ++j) above[j] = kWorst;
  uint8_t* moves = p.moves;
  Strip<In, T> strip;
  for (int64_t first = 0; first < rows; first += kStrip, moves += steps * kStrip) {
    for (int64_t l = 0; l < kStrip; ++l) {
      // Rows beyond the last do the last one again; nobody reads what they find.
      strip.row[l] = p.values + (first + l < rows ? first + l : rows - 1) * p.stride;
      strip.left[l] = strip.diagonal[l] = kWorst;
    }
    if (first == 0) strip.left[0] = 0;
    int64_t s = 0;
    for (; s < kStrip - 1; ++s)
      step_strip<Rule>(strip, s, s < columns ? 0 : s - columns + 1, s + 1, above, moves);
    for (; s < columns; ++s) step_strip<Rule>(strip, s, 0, kStrip, above, moves);
    for (; s < steps; ++s) step_strip<Rule>(strip, s, s - columns + 1, kStrip, above, moves);
  }
  return strip.left[(rows - 1) % kStrip];
}

template <typename Rule>
constexpr LatticeRows rows_of_rule() {
  return {sweep_lattice<Rule, float, float>, sweep_lattice<Rule, float, double>,
          sweep_lattice<Rule, double, double>, kStrip};
}

}  // namespace
}  // namespace TOKCORE_ISA
}  // namespace tokcore
