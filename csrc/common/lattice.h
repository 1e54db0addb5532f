// Matrices of unequal sizes in one batch, and monotone paths through them: what the alignment
// operators share, on both devices. Sums and comparisons only, no product is added to anything:
// there is nothing that a compiler could contract, so all devices take the same path.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define TOKCORE_LATTICE_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_LATTICE_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kUndefined = std::numeric_limits<T>::quiet_NaN();
template <typename T>
constexpr double kLargest = std::numeric_limits<T>::max();

template <typename In>
struct Lattices {
  const In* values;                             // (batch, rows, columns)
  const int64_t *row_lengths, *column_lengths;  // null: all of them
  int64_t batch, rows, columns;

  TOKCORE_LATTICE_HD int64_t rows_of(int64_t item) const {
    return row_lengths == nullptr ? rows : row_lengths[item];
  }
  TOKCORE_LATTICE_HD int64_t columns_of(int64_t item) const {
    return column_lengths == nullptr ? columns : column_lengths[item];
  }
  TOKCORE_LATTICE_HD bool fits(int64_t item) const {
    const int64_t m = rows_of(item), n = columns_of(item);
    return m >= 0 && m <= rows && n >= 0 && n <= columns;
  }
  TOKCORE_LATTICE_HD const In* of(int64_t item) const { return values + item * rows * columns; }
};

// Of values whose sums along any path, and between any two such sums, stay finite in T.
template <typename T, typename In>
TOKCORE_LATTICE_HD In largest_value(int64_t rows, int64_t columns) {
  const double largest = kLargest<T> / (4.0 * double(rows + columns + 1));
  return In(largest < kLargest<In> ? largest : kLargest<In>);
}

// `forbidden`, an infinity, closes a cell to every path. No branch: the CPU looks at vectors.
template <typename In>
TOKCORE_LATTICE_HD bool is_usable(In value, In forbidden, In largest) {
  return (int(value == forbidden) | int(std::fabs(value) <= largest)) != 0;
}

// ---- paths of steps (1, 1), (1, 0), (0, 1) ----------------------------------------------------

// Where the best path to a cell comes from. It begins from the left of the first one.
enum Move : uint8_t { kDiagonal, kFromAbove, kFromLeft };

// Dynamic time warping: the least sum. Ties: diagonal, from above, from the left.
struct Warping {
  static constexpr int64_t kShift = 0;
  template <typename T>
  static constexpr T kWorst = kInfinity<T>;

  template <typename T>
  TOKCORE_LATTICE_HD static T cell(T value, T diagonal, T above, T left, uint8_t& move) {
    T best = diagonal;
    move = kDiagonal;
    move = above < best ? uint8_t(kFromAbove) : move;
    best = above < best ? above : best;
    move = left < best ? uint8_t(kFromLeft) : move;
    best = left < best ? left : best;
    return value + best;
  }
};

// Monotonic search: the greatest sum with one cell a column, the row the same as in the column
// before or the next one. Ties: the same row.
struct Search {
  static constexpr int64_t kShift = 1;
  template <typename T>
  static constexpr T kWorst = -kInfinity<T>;

  template <typename T>
  TOKCORE_LATTICE_HD static T cell(T value, T /* diagonal */, T above, T left, uint8_t& move) {
    move = above > left ? uint8_t(kFromAbove) : uint8_t(kFromLeft);
    return value + (above > left ? above : left);
  }
};

// Cells of a row that a path can visit. They begin kShift columns behind those of the row before,
// and columns are counted from there: to the search the row before is above. An item of fewer
// than kShift columns for each row has no path.
template <typename Rule>
TOKCORE_LATTICE_HD int64_t band_width(int64_t rows, int64_t columns) {
  return columns - Rule::kShift * (rows - 1);
}

// Moves are kept as they are found: by strips of `strip` rows, in which row r is r % strip columns
// late, so that what is found at one time lies side by side.
TOKCORE_LATTICE_HD int64_t move_count(int64_t rows, int64_t columns, int64_t strip) {
  return (rows + strip - 1) / strip * strip * (columns + strip - 1);
}
TOKCORE_LATTICE_HD int64_t move_index(int64_t row, int64_t column, int64_t columns, int64_t strip) {
  const int64_t lane = row % strip;
  return (row / strip * (columns + strip - 1) + column + lane) * strip + lane;
}

// visit(row, column) from the last cell back to the first.
template <typename Visit>
TOKCORE_LATTICE_HD void trace_back(const uint8_t* moves, int64_t rows, int64_t columns,
                                   int64_t strip, const Visit& visit) {
  int64_t row = rows - 1, column = columns - 1;
  visit(row, column);
  while (row > 0 || column > 0) {
    const uint8_t move = moves[move_index(row, column, columns, strip)];
    if (move != kFromLeft) --row;
    if (move != kFromAbove) --column;
    visit(row, column);
  }
}

}  // namespace
}  // namespace tokcore
