// Where row n of a tensor (..., V) starts, for any strides of the leading dimensions: no operator
// copies a slice.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TOKCORE_ROWS_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_ROWS_HD inline __attribute__((always_inline))
#endif

namespace tokcore {

constexpr int kMaxRowDims = 8;

struct RowIndex {
  int dims =
      0;  // after merging neighbours that are contiguous with each other; almost always 0 to 2
  int64_t sizes[kMaxRowDims] = {};
  int64_t strides[kMaxRowDims] = {};  // in elements

  TOKCORE_ROWS_HD int64_t offset(int64_t row) const {
    int64_t elements = 0;
    for (int d = dims - 1; d > 0; --d) {
      elements += (row % sizes[d]) * strides[d];
      row /= sizes[d];
    }
    return dims > 0 ? elements + row * strides[0] : 0;
  }
};

}  // namespace tokcore
