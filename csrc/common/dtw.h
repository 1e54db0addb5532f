// The outputs of dtw, as both devices write them.
#pragma once

#include "common/lattice.h"

namespace tokcore {
namespace {

template <typename In, typename T>
struct DtwTensors {
  Lattices<In> in;
  T* cost;               // (batch,)
  int32_t* path;         // (batch, steps, 2), -1 behind its end
  int32_t* path_length;  // (batch,)

  TOKCORE_LATTICE_HD int64_t steps() const {
    return in.rows + in.columns > 0 ? in.rows + in.columns - 1 : 0;
  }
  // Item without cells, or without a path of finite cost: no path.
  TOKCORE_LATTICE_HD void put(int64_t item, T least, const uint8_t* moves, int64_t strip) const {
    const int64_t rows = in.rows_of(item), columns = in.columns_of(item);
    const bool found = rows > 0 && columns > 0 && least < kInfinity<T>;
    int64_t length = 0;
    if (found) trace_back(moves, rows, columns, strip, [&](int64_t, int64_t) { ++length; });
    cost[item] = least;
    path_length[item] = int32_t(length);
    int32_t* to = path + 2 * item * steps();
    for (int64_t i = 2 * length; i < 2 * steps(); ++i) to[i] = -1;
    if (!found) return;
    trace_back(moves, rows, columns, strip, [&](int64_t row, int64_t column) {
      --length;
      to[2 * length] = int32_t(row);
      to[2 * length + 1] = int32_t(column);
    });
  }
  // An item with a value or a length that is wrong.
  TOKCORE_LATTICE_HD void put_wrong(int64_t item) const {
    cost[item] = kUndefined<T>;
    path_length[item] = -1;
    for (int64_t i = 0; i < 2 * steps(); ++i) path[2 * item * steps() + i] = -1;
  }
};

}  // namespace
}  // namespace tokcore
