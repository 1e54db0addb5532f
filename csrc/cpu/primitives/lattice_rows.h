// The table of a lattice operator: its sweep for each type of values and sums. For fronts and rows.
#pragma once

#include <cstdint>

#include "cpu/primitives/isa.h"

namespace tokcore {

template <typename In, typename T>
struct LatticeSweep {
  const In* values;
  int64_t stride, rows, columns;  // of one item
  T* above;                       // scratch (columns)
  uint8_t* moves;                 // out, as trace_back reads them
};

struct LatticeRows {
  float (*of_float)(const LatticeSweep<float, float>&);
  double (*of_float_in_double)(const LatticeSweep<float, double>&);
  double (*of_double)(const LatticeSweep<double, double>&);
  int64_t strip;
};

}  // namespace tokcore
