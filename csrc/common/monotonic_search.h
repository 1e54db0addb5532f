// The outputs of monotonic_search, as both devices write them.
#pragma once

#include "common/lattice.h"

namespace tokcore {
namespace {

template <typename In, typename T>
struct SearchTensors {
  Lattices<In> in;
  T* score;            // (batch,)
  int32_t* rows;       // (batch, in.columns): the row of each column, -1 behind the end
  int32_t* durations;  // (batch, in.rows): the columns of each row, -1 behind the end

  // Without a path of finite score, all of them -1.
  TOKCORE_LATTICE_HD void put(int64_t item, T greatest, const uint8_t* moves, int64_t strip) const {
    const int64_t m = in.rows_of(item), n = in.columns_of(item);
    const bool found = m > 0 && n > 0 && greatest > -kInfinity<T>;
    put_none(item, greatest);
    if (!found) return;
    int32_t* row_of = rows + item * in.columns;
    int32_t* duration = durations + item * in.rows;
    for (int64_t i = 0; i < m; ++i) duration[i] = 0;
    trace_back(moves, m, band_width<Search>(m, n), strip, [&](int64_t row, int64_t column) {
      row_of[row * Search::kShift + column] = int32_t(row);
      ++duration[row];
    });
  }
  TOKCORE_LATTICE_HD void put_none(int64_t item, T value) const {
    score[item] = value;
    for (int64_t i = 0; i < in.columns; ++i) rows[item * in.columns + i] = -1;
    for (int64_t i = 0; i < in.rows; ++i) durations[item * in.rows + i] = -1;
  }
  // An item with a value or a length that is wrong, or with more rows than columns.
  TOKCORE_LATTICE_HD void put_wrong(int64_t item) const { put_none(item, kUndefined<T>); }
};

}  // namespace
}  // namespace tokcore
