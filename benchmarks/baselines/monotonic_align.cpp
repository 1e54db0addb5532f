// SongMASS's alignment as one writes it in C++ without further thought about the machine: running
// sums, a table of penalties, one comparison after the other, one thread, a back-pointer for each
// cell. Cells and sums lie along rows and along columns, so that no loop strides. Finite scores
// only. Compiled by monotonic_align.py with the system compiler; no part of the library.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

extern "C" void align(const double* scores, std::int64_t batch, std::int64_t rows,
                      std::int64_t columns, double penalty, double* best, std::int32_t* groups,
                      std::int32_t* counts) {
  const double infinity = std::numeric_limits<double>::infinity();
  const std::int64_t along_rows = columns + 1, along_columns = rows + 1;
  std::vector<double> cells(along_columns * along_rows), cells_by_column(cells.size());
  std::vector<double> sums(cells.size()), sums_by_column(cells.size());
  std::vector<double> row_costs(along_columns), column_costs(along_rows);
  std::vector<std::int32_t> moves(rows * columns);  // rows of a group, or -columns
  for (std::int64_t k = 1; k <= rows; ++k) row_costs[k] = penalty * k / rows;
  for (std::int64_t k = 1; k <= columns; ++k) column_costs[k] = penalty * k / columns;

  for (std::int64_t b = 0; b < batch; ++b, scores += rows * columns) {
    for (std::int64_t i = 0; i <= rows; ++i) {
      for (std::int64_t j = 0; j <= columns; ++j) {
        const std::int64_t by_row = i * along_rows + j, by_column = j * along_columns + i;
        cells[by_row] = cells_by_column[by_column] = i == 0 && j == 0 ? 0 : -infinity;
        sums[by_row] = sums_by_column[by_column] = 0;
        if (i == 0 || j == 0) continue;
        const double score = scores[(i - 1) * columns + j - 1];
        sums[by_row] = sums[by_row - 1] + score;
        sums_by_column[by_column] = sums_by_column[by_column - 1] + score;
      }
    }
    for (std::int64_t i = 1; i <= rows; ++i) {
      for (std::int64_t j = 1; j <= columns; ++j) {
        double found = -infinity;
        std::int32_t move = 0;
        const double* cell = &cells_by_column[(j - 1) * along_columns];
        const double* sum = &sums_by_column[j * along_columns];
        for (std::int64_t k = 0; k < i; ++k) {
          const double value = cell[k] + (sum[i] - sum[k]) / (i - k) - row_costs[i - k];
          if (value > found) {
            found = value;
            move = i - k;
          }
        }
        cell = &cells[(i - 1) * along_rows];
        sum = &sums[i * along_rows];
        for (std::int64_t k = 0; k < j; ++k) {
          const double value = cell[k] + (sum[j] - sum[k]) / (j - k) - column_costs[j - k];
          if (value > found) {
            found = value;
            move = k - j;
          }
        }
        cells[i * along_rows + j] = cells_by_column[j * along_columns + i] = found;
        moves[(i - 1) * columns + j - 1] = move;
      }
    }
    best[b] = cells[rows * along_rows + columns];

    const std::int64_t most = rows + columns - 1;
    std::int32_t* const out = groups + b * most * 4;
    std::int64_t i = rows, j = columns, count = 0;
    for (; i > 0; ++count) {
      const std::int32_t move = moves[(i - 1) * columns + j - 1];
      const std::int64_t height = std::max(move, 1), width = std::max(-move, 1);
      const std::int64_t group[] = {i - height, i, j - width, j};
      std::copy(group, group + 4, out + count * 4);
      i -= height;
      j -= width;
    }
    for (std::int64_t k = 0; k < count / 2; ++k) {
      std::swap_ranges(out + k * 4, out + k * 4 + 4, out + (count - 1 - k) * 4);
    }
    std::fill(out + count * 4, out + most * 4, -1);
    counts[b] = static_cast<std::int32_t>(count);
  }
}
