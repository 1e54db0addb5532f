// What an operator's front and its rows both know: storage types, the column blocks, and how work
// is cut.
#pragma once

#include <cstdint>

namespace tokcore {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// Columns that are reduced as one block, a constant so that a row's result depends on nothing but
// the row. Two blocks of float32 fill a 32 KB first level cache.
constexpr int64_t kBlockColumns = 4096;
__attribute__((always_inline)) constexpr int64_t block_count(int64_t columns) {
  return (columns + kBlockColumns - 1) / kBlockColumns;
}

}  // namespace tokcore
