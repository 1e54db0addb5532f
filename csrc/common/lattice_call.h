// The arguments that the alignment operators share, checked before anything is allocated.
#pragma once

#include "common/check.h"
#include "common/monotonic_align.h"

namespace tokcore {
namespace {

struct LatticeCall {
  Tensor values;
  std::optional<Tensor> row_lengths, column_lengths;
  int64_t batch = 0, rows = 0, columns = 0;
  bool wide = true;  // sums in double

  template <typename In>
  Lattices<In> lattices() const {
    return {static_cast<const In*>(values.const_data_ptr()),
            data_or_null<int64_t>(row_lengths),
            data_or_null<int64_t>(column_lengths),
            batch,
            rows,
            columns};
  }
  Lattices<float> sizes() const {
    return {nullptr,
            data_or_null<int64_t>(row_lengths),
            data_or_null<int64_t>(column_lengths),
            batch,
            rows,
            columns};
  }
  // Of the longest path: cells of a walk from corner to corner.
  int64_t steps() const { return rows + columns > 0 ? rows + columns - 1 : 0; }
  ScalarType sum_type() const { return wide ? ScalarType::Double : ScalarType::Float; }

  // body(In(), T()) for the values' type and that of the sums.
  template <typename Body>
  void dispatch(const Body& body) const {
    if (values.scalar_type() == ScalarType::Double)
      body(double(), double());
    else if (wide)
      body(float(), double());
    else
      body(float(), float());
  }
};

template <typename T>
T* data_of(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline LatticeCall checked_lattice(const char* op, const char* name, const Tensor& values,
                                   const std::optional<Tensor>& row_lengths,
                                   const std::optional<Tensor>& column_lengths, bool wide) {
  const ScalarType type = values.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, op, name,
        " must be float32 or float64, got ", toString(type));
  check(values.dim() == 3, op, name, " must have shape (B, M, L), got ", to_text(shape_of(values)));
  check(wide || type == ScalarType::Float, op, "dtype float32 would round ", name, ", got ",
        toString(type));
  LatticeCall call;
  call.batch = values.size(0);
  call.rows = values.size(1);
  call.columns = values.size(2);
  call.wide = wide;
  call.values = torch::stable::contiguous(values);
  const auto lengths = [&](const char* which, const std::optional<Tensor>& t) {
    return check_rows(op, which, t, name, values, ScalarType::Long, {call.batch});
  };
  call.row_lengths = lengths("row_lengths", row_lengths);
  call.column_lengths = lengths("column_lengths", column_lengths);
  return call;
}

inline LatticeCall checked_align(const char* op, const Tensor& scores,
                                 const std::optional<Tensor>& row_lengths,
                                 const std::optional<Tensor>& column_lengths, bool wide) {
  const LatticeCall call = checked_lattice(op, "scores", scores, row_lengths, column_lengths, wide);
  check(call.rows <= kMostAligned && call.columns <= kMostAligned, op, "scores may have at most ",
        kMostAligned, " rows and columns, got ", to_text(shape_of(scores)));
  return call;
}

}  // namespace
}  // namespace tokcore
