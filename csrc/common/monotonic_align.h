// Partition of rows and columns into groups of one with several: what both devices share.
//
// The longer dimension of an item lies along `lanes`, whose cells do not wait for each other, the
// shorter along `steps`. Cell (p, q), counted from 1, is the best partition of the first p lanes
// and q steps; its move is +x where the last group is x lanes at step q, -x where it is x steps at
// lane p. Candidates in the order of the definition: several rows at one column from the longest
// group on, then several columns at one row; the first maximum wins.
//
// A group's sum is the difference of two running sums, and a division (not a product with an
// inverse: equal means would come out unequal) makes the mean. Forbidden scores are left out of the
// sums; groups that would hold one are not tried.
#pragma once

#include "common/lattice.h"

namespace tokcore {
namespace {

constexpr int64_t kMostAligned = 32767;  // rows or columns: a move is an int16

// Correctly rounded, as / is; nvcc makes float's own division a call around which registers spill.
template <typename T>
TOKCORE_LATTICE_HD T divide(T sum, int64_t count) {
  return T(double(sum) / double(count));
}

// Of x lanes (or steps) out of `length`.
template <typename T>
TOKCORE_LATTICE_HD T length_cost(T penalty, int64_t x, int64_t length) {
  return divide(penalty * T(x), length);
}

template <typename In, typename T>
struct AlignTensors {
  Lattices<In> in;
  T penalty;
  T* score;              // (batch,)
  int32_t* groups;       // (batch, longest, 4): rows [0], [1], columns [2], [3], -1 behind the end
  int32_t* group_count;  // (batch,)
  int32_t* row_ranges;   // (batch, in.rows, 2): the columns of each row, -1 behind the end
  int32_t* column_ranges;  // (batch, in.columns, 2)

  TOKCORE_LATTICE_HD int64_t longest() const {
    return in.rows + in.columns > 0 ? in.rows + in.columns - 1 : 0;
  }
  TOKCORE_LATTICE_HD bool rows_are_lanes(int64_t item) const {
    return in.rows_of(item) >= in.columns_of(item);
  }
  TOKCORE_LATTICE_HD void put_none(int64_t item, T value, int32_t count) const {
    score[item] = value;
    group_count[item] = count;
    for (int64_t i = 0; i < 4 * longest(); ++i) groups[4 * item * longest() + i] = -1;
    for (int64_t i = 0; i < 2 * in.rows; ++i) row_ranges[2 * item * in.rows + i] = -1;
    for (int64_t i = 0; i < 2 * in.columns; ++i) column_ranges[2 * item * in.columns + i] = -1;
  }
  TOKCORE_LATTICE_HD void put_empty(int64_t item) const {
    put_none(item, in.rows_of(item) == in.columns_of(item) ? T(0) : -kInfinity<T>, 0);
  }
  // `count` moves from the last group to the first; none where every partition is forbidden.
  TOKCORE_LATTICE_HD void put(int64_t item, T best, const int16_t* moves, int64_t count) const {
    put_none(item, best, int32_t(count));
    const bool rows_first = rows_are_lanes(item);
    int64_t row = in.rows_of(item), column = in.columns_of(item);
    int32_t* to = groups + 4 * item * longest();
    for (int64_t i = 0; i < count; ++i) {
      const bool several_rows = (moves[i] > 0) == rows_first;
      const int64_t size = moves[i] > 0 ? moves[i] : -moves[i];
      const int64_t rows_end = row, columns_end = column;
      row -= several_rows ? size : 1;
      column -= several_rows ? 1 : size;
      int32_t* group = to + 4 * (count - 1 - i);
      group[0] = int32_t(row);
      group[1] = int32_t(rows_end);
      group[2] = int32_t(column);
      group[3] = int32_t(columns_end);
      for (int64_t r = row; r < rows_end; ++r) {
        row_ranges[2 * (item * in.rows + r)] = int32_t(column);
        row_ranges[2 * (item * in.rows + r) + 1] = int32_t(columns_end);
      }
      for (int64_t c = column; c < columns_end; ++c) {
        column_ranges[2 * (item * in.columns + c)] = int32_t(row);
        column_ranges[2 * (item * in.columns + c) + 1] = int32_t(rows_end);
      }
    }
  }
  // An item with a value or a length that is wrong.
  TOKCORE_LATTICE_HD void put_wrong(int64_t item) const { put_none(item, kUndefined<T>, -1); }
};

}  // namespace
}  // namespace tokcore
