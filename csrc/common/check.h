// Facts about tensors, checked before anything is allocated. Every text names the operator, the
// argument, the rule and the value found. Argument semantics (a negative temperature) are checked
// in Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/rows.h"

namespace tokcore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string to_text(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline Shape shape_of(const Tensor& t) {
  Shape shape(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) shape[d] = t.size(d);
  return shape;
}

inline Shape leading_shape(const Tensor& t) {
  Shape shape = shape_of(t);
  shape.pop_back();
  return shape;
}

inline Shape with_last(Shape shape, int64_t size) {
  shape.push_back(size);
  return shape;
}

inline int64_t count(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// Statistics come back in float32, whatever the logits' dtype, and in float64 for double.
inline ScalarType statistics_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  check(t.device() == like.device(), op, name, " must be on the device of ", like_name, " (type ",
        static_cast<int>(like.device().type()), ", index ", static_cast<int>(like.device().index()),
        "), got type ", static_cast<int>(t.device().type()), ", index ",
        static_cast<int>(t.device().index()));
}

inline void check_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  check(t.scalar_type() == type, op, name, " must be ", toString(type), ", got ",
        toString(t.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const Shape& shape) {
  check(shape_of(t) == shape, op, name, " must have shape ", to_text(shape), ", got ",
        to_text(shape_of(t)));
}

inline void check_logits(const char* op, const char* name, const Tensor& t) {
  check(t.dim() >= 1, op, name, " must have at least one dimension (..., V), got a scalar");
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
            type == ScalarType::BFloat16,
        op, name, " must be float32, float64, float16 or bfloat16, got ", toString(type));
  check(t.size(-1) >= 1, op, name, " must have a vocabulary of at least one entry, got shape ",
        to_text(shape_of(t)));
}

// Two logits of one vocabulary. A policy padded to a multiple of 64 beside an unpadded reference is
// the usual mistake.
inline void check_pair(const char* op, const Tensor& policy, const Tensor& reference) {
  check_device(op, "reference_logits", reference, "policy_logits", policy);
  check_type(op, "reference_logits", reference, policy.scalar_type());
  check(reference.dim() == 0 || reference.size(-1) == policy.size(-1), op,
        "vocabularies differ: policy_logits has V = ", policy.size(-1),
        ", reference_logits V = ", reference.size(-1));
  check_shape(op, "reference_logits", reference, shape_of(policy));
}

// The kernels walk a row with stride 1; any other last stride is copied once.
inline Tensor unit_last_stride(const Tensor& t) {
  return t.size(-1) == 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

inline RowIndex row_index(const char* op, const Tensor& t) {
  RowIndex rows;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == stride * size) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    check(rows.dims < kMaxRowDims, op, "logits may have at most ", kMaxRowDims,
          " leading dimensions that do not merge, got shape ", to_text(shape_of(t)));
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims++] = stride;
  }
  return rows;
}

// target (...) or, where `several` allows it, (..., K); contiguous int64 ids come back.
struct Target {
  Tensor ids;
  int64_t per_row = 1;
};

inline Target check_target(const char* op, const Tensor& target, const char* logits_name,
                           const Tensor& logits, bool several) {
  const ScalarType type = target.scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, op,
        "target must be int64 or int32, got ", toString(type));
  check_device(op, "target", target, logits_name, logits);
  const bool one = target.dim() + 1 == logits.dim();
  Shape expected = leading_shape(logits);
  if (several && target.dim() == logits.dim()) expected.push_back(target.size(-1));
  check(one || (several && target.dim() == logits.dim()), op, "target must have shape ",
        to_text(leading_shape(logits)), several ? " or that with K appended" : "", ", got ",
        to_text(shape_of(target)));
  check_shape(op, "target", target, expected);
  const Tensor ids =
      type == ScalarType::Long ? target : torch::stable::to(target, ScalarType::Long);
  return {torch::stable::contiguous(ids), one ? 1 : target.size(-1)};
}

// An optional per-row argument or gradient: `type`, `shape`, on the logits' device; contiguous.
// Undefined when absent.
inline std::optional<Tensor> check_rows(const char* op, const char* name,
                                        const std::optional<Tensor>& t, const char* logits_name,
                                        const Tensor& logits, ScalarType type, const Shape& shape) {
  if (!t.has_value()) return std::nullopt;
  check_device(op, name, *t, logits_name, logits);
  check_type(op, name, *t, type);
  check_shape(op, name, *t, shape);
  return torch::stable::contiguous(*t);
}

// An in-place gradient may neither be lost in a copy nor land twice on one entry.
inline void check_overwritable(const char* op, const char* name, const Tensor& logits) {
  check(logits.size(-1) == 1 || logits.stride(-1) == 1, op, name,
        " must have a last stride of 1 to be overwritten, got ", logits.stride(-1));
  for (int64_t d = 0; d < logits.dim(); ++d)
    check(logits.size(d) <= 1 || logits.stride(d) != 0, op, name,
          " must not be an expanded view to be overwritten: dimension ", d, " has stride 0");
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace
}  // namespace tokcore
