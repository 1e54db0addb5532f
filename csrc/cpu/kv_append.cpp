// New tokens written behind those in use: copied, or quantised group by group; heads and tokens in
// parallel.
//
// The file is compiled once as the front (torch: checks, threads, copies) and once per instruction
// set as the rows, which quantise.
#include "common/kv_append.h"

#include <cstring>

#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"

namespace tokcore {

struct QuantizeParams : KvAppend {
  Storage storage;  // of the tokens
};

struct KvAppendRows {
  // Units: tokens of all heads (2, B, Hkv, Q), first those of the keys.
  void (*quantize)(const QuantizeParams&, int64_t begin, int64_t end);
};
TOKCORE_DECLARE_LEVELS(KvAppendRows, kv_append_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/vocabulary.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

constexpr int kLanes = 16;  // entries that are looked at together: what one instruction takes

// Least, greatest, and whether all are finite, in lanes: a loop over one minimum waits for it.
template <typename T>
Quantizer quantizer_of(const T* x, int64_t size) {
  float least[kLanes], greatest[kLanes], wrong[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    least[i] = greatest[i] = to_acc(x[0]);
    wrong[i] = 0;
  }
  const auto look = [&](int i, float entry) {
    least[i] = entry < least[i] ? entry : least[i];
    greatest[i] = entry > greatest[i] ? entry : greatest[i];
    wrong[i] += entry - entry;  // 0, or NaN
  };
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes)
    for (int i = 0; i < kLanes; ++i) look(i, to_acc(x[d + i]));
  for (; d < size; ++d) look(0, to_acc(x[d]));
  for (int i = 1; i < kLanes; ++i) {
    least[0] = least[i] < least[0] ? least[i] : least[0];
    greatest[0] = greatest[i] > greatest[0] ? greatest[i] : greatest[0];
    wrong[0] += wrong[i];
  }
  return Quantizer(least[0], greatest[0], wrong[0] == 0);
}

template <typename T>
void quantize_group(const T* x, int64_t size, uint8_t* out, float* quantization) {
  const Quantizer quantizer = quantizer_of(x, size);
  quantization[0] = quantizer.stored_scale;
  quantization[1] = quantizer.stored_offset;
  if (!quantizer.varies()) {
    std::memset(out, 0, size);
    return;
  }
  for (int64_t d = 0; d < size; ++d) out[d] = quantizer.code(to_acc(x[d]));
}

template <typename T>
void quantize_units(const QuantizeParams& p, int64_t begin, int64_t end) {
  const int64_t heads = p.sizes.batch * p.sizes.heads;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit % p.queries, head = unit / p.queries % heads;
    if (i >= p.valid_tokens[head / p.sizes.heads]) continue;
    const Appended& side = p.sides[unit / p.queries / heads];
    const int64_t to = p.stored_row(head, i), size = p.dim / side.groups;
    const T* token = static_cast<const T*>(side.tokens) + p.token_row(head, i) * p.dim;
    for (int64_t g = 0; g < side.groups; ++g)
      quantize_group(token + g * size, size,
                     static_cast<uint8_t*>(side.stored) + to * p.dim + g * size,
                     side.quantization + 2 * (to * side.groups + g));
  }
}

// What is quantised is never double: that storage has no rows here.
void quantize(const QuantizeParams& p, int64_t begin, int64_t end) {
  __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED);
  if (p.storage == Storage::kFloat) return quantize_units<float>(p, begin, end);
  if (p.storage == Storage::kHalf) return quantize_units<Fp16>(p, begin, end);
  quantize_units<Bf16>(p, begin, end);
}

}  // namespace

extern const KvAppendRows kv_append_rows = {quantize};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/kv_append_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

void check_values(const char* op, const KvAppend& p) {
  const KvSizes& sizes = p.sizes;
  check_counts(op, p.count, sizes, sizes.slots);
  check_not_negative(op, "length", p.length, sizes.batch);
  for (int64_t b = 0; b < sizes.batch; ++b) {
    check(p.valid_tokens[b] >= 0 && p.valid_tokens[b] <= p.queries, op,
          "valid must lie in [0, Q = ", p.queries, "], got ", p.valid_tokens[b], " in row ", b);
    check(p.valid_row(b), op, "length + valid must be at most ", kMostPosition, ", got ",
          p.length[b], " + ", p.valid_tokens[b], " in row ", b);
  }
  for (int64_t list = 0; list < sizes.all_lists(); ++list) {
    const int64_t b = list / sizes.lists, n = p.count[list], added = p.valid_tokens[b];
    check(n + added <= sizes.slots, op, "row ", b, " has no room: count ", n, " and ", added,
          " tokens of Q = ", p.queries, " exceed C = ", sizes.slots, " slots (list ",
          list % sizes.lists, ")");
    check(p.valid(list), op, "length must exceed the position of the last slot in use, got ",
          p.length[b], " in row ", b, " after position ",
          n > 0 ? p.position[list * sizes.slots + n - 1] : -1);
  }
}

void copy_tokens(const KvAppend& p) {
  const int64_t heads = p.sizes.batch * p.sizes.heads, bytes = p.dim * p.entry_bytes;
  parallel_units(2 * heads, p.queries * p.dim, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit % heads, tokens = p.valid_tokens[head / p.sizes.heads];
      if (tokens == 0) continue;
      const Appended& side = p.sides[unit / heads];
      std::memcpy(static_cast<char*>(side.stored) + p.stored_row(head, 0) * bytes,
                  static_cast<const char*>(side.tokens) + p.token_row(head, 0) * bytes,
                  tokens * bytes);
    }
  });
}

void append_to_lists(const KvAppend& p) {
  for (int64_t list = 0; list < p.sizes.all_lists(); ++list) {
    const int64_t b = list / p.sizes.lists, at = list * p.sizes.slots + p.count[list];
    for (int64_t i = 0; i < p.valid_tokens[b]; ++i) p.position[at + i] = int32_t(p.length[b] + i);
    std::fill_n(p.last_selected + at, p.valid_tokens[b], -1);
    p.count[list] += p.valid_tokens[b];
  }
}

void kv_append_cpu(Tensor key, Tensor value, Tensor position, Tensor last_selected, Tensor count,
                   const Tensor& new_key, const Tensor& new_value, const Tensor& length,
                   const Tensor& valid, std::optional<Tensor> key_quantization,
                   std::optional<Tensor> value_quantization) {
  const char* op = "kv_append";
  const KvAppendCall call =
      checked_append(op, key, value, position, last_selected, count, new_key, new_value, length,
                     valid, key_quantization, value_quantization);
  check_values(op, call.p);
  if (call.quantized) {
    const QuantizeParams p{call.p, storage_of(*call.new_key)};
    parallel_units(2 * p.sizes.batch * p.sizes.heads * p.queries, p.dim,
                   [&](int64_t begin, int64_t end) {
                     TOKCORE_CHOSEN(kv_append_rows).quantize(p, begin, end);
                   });
  } else {
    copy_tokens(call.p);
  }
  append_to_lists(call.p);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&tokcore::kv_append_cpu));
}

#endif
