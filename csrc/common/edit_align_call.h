// The call of edit_align as both devices take it: arguments are checked here, before anything is
// allocated.
#pragma once

#include <limits>

#include "common/check.h"
#include "common/edit_align.h"

namespace tokcore {
namespace {

// A sequence of each batch item, and how much of it counts.
template <typename id_t>
struct EditSequences {
  const id_t* ids;
  const int64_t* lengths;  // null: all of it
  int64_t size;

  TOKCORE_EDIT_HD const id_t* of(int64_t pair) const { return ids + pair * size; }
  TOKCORE_EDIT_HD int64_t length(int64_t pair) const {
    return lengths == nullptr ? size : lengths[pair];
  }
  TOKCORE_EDIT_HD bool has_valid_length(int64_t pair) const {
    return lengths == nullptr || (lengths[pair] >= 0 && lengths[pair] <= size);
  }
};

// What is written for each pair; -1 in the padding.
struct EditOutputs {
  int32_t* distance;    // ()
  int8_t* operations;   // (H + R,)
  int32_t* count;       // ()
  int8_t* tags;         // (H,)
  int32_t* gap_counts;  // (H + 1,)
};

template <typename id_t>
struct EditTensors {
  int64_t pairs;
  EditSequences<id_t> hypothesis, reference;
  EditOutputs outputs;
};

struct EditCall {
  Tensor hypothesis, reference;
  std::optional<Tensor> hypothesis_lengths, reference_lengths;
  Shape pairs;  // the leading dimensions

  int64_t hypothesis_size() const { return hypothesis.size(-1); }
  int64_t reference_size() const { return reference.size(-1); }
  Shape operations_shape() const { return with_last(pairs, hypothesis_size() + reference_size()); }
  Shape tags_shape() const { return with_last(pairs, hypothesis_size()); }
  Shape gaps_shape() const { return with_last(pairs, hypothesis_size() + 1); }

  template <typename id_t>
  EditTensors<id_t> tensors(Tensor& distance, Tensor& operations, Tensor& count, Tensor& tags,
                            Tensor& gap_counts) const {
    return {tokcore::count(pairs),
            {static_cast<const id_t*>(hypothesis.const_data_ptr()),
             data_or_null<int64_t>(hypothesis_lengths), hypothesis_size()},
            {static_cast<const id_t*>(reference.const_data_ptr()),
             data_or_null<int64_t>(reference_lengths), reference_size()},
            {static_cast<int32_t*>(distance.mutable_data_ptr()),
             static_cast<int8_t*>(operations.mutable_data_ptr()),
             static_cast<int32_t*>(count.mutable_data_ptr()),
             static_cast<int8_t*>(tags.mutable_data_ptr()),
             static_cast<int32_t*>(gap_counts.mutable_data_ptr())}};
  }
};

inline Tensor as_int64(const Tensor& t) {
  return t.scalar_type() == ScalarType::Long ? t : torch::stable::to(t, ScalarType::Long);
}

inline void check_integers(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, op, name,
        " must be int64 or int32, got ", toString(t.scalar_type()));
}

inline std::optional<Tensor> checked_lengths(const char* op, const char* name,
                                             const std::optional<Tensor>& lengths,
                                             const Tensor& hypothesis, const Shape& pairs) {
  if (!lengths.has_value()) return std::nullopt;
  check_integers(op, name, *lengths);
  check_device(op, name, *lengths, "hypothesis", hypothesis);
  check_shape(op, name, *lengths, pairs);
  return torch::stable::contiguous(as_int64(*lengths));
}

inline EditCall checked_edit_align(const char* op, const Tensor& hypothesis,
                                   const Tensor& reference,
                                   const std::optional<Tensor>& hypothesis_lengths,
                                   const std::optional<Tensor>& reference_lengths) {
  check_integers(op, "hypothesis", hypothesis);
  check_integers(op, "reference", reference);
  check_device(op, "reference", reference, "hypothesis", hypothesis);
  check(hypothesis.dim() >= 1 && reference.dim() >= 1, op,
        "hypothesis and reference must have shapes (..., H) and (..., R), got ",
        to_text(shape_of(hypothesis)), " and ", to_text(shape_of(reference)));
  const Shape pairs = leading_shape(hypothesis);
  check_shape(op, "reference", reference, with_last(pairs, reference.size(-1)));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(hypothesis.size(-1) < kMost && reference.size(-1) < kMost - hypothesis.size(-1), op,
        "hypothesis and reference must have fewer than ", kMost, " tokens together, got ",
        hypothesis.size(-1), " and ", reference.size(-1));
  EditCall call;
  call.pairs = pairs;
  call.hypothesis_lengths =
      checked_lengths(op, "hypothesis_lengths", hypothesis_lengths, hypothesis, pairs);
  call.reference_lengths =
      checked_lengths(op, "reference_lengths", reference_lengths, hypothesis, pairs);
  const bool one_type = hypothesis.scalar_type() == reference.scalar_type();
  call.hypothesis = torch::stable::contiguous(one_type ? hypothesis : as_int64(hypothesis));
  call.reference = torch::stable::contiguous(one_type ? reference : as_int64(reference));
  return call;
}

}  // namespace
}  // namespace tokcore
