// Attention of one query a head to listed slots of a cache. A unit is a block of slots of one KV
// head: its keys are swept once for all query heads of the group, their scores become exponentials
// above the block's maximum, and the values are swept once with these. Then the blocks meet: the
// output of a head from theirs, and the weights of a slot from its exponentials in all heads that
// share the list.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include "common/cached_attention.h"
#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"
#include "cpu/primitives/slot_blocks.h"

namespace tokcore {

struct SparseDecodeParams : CachedAttention {
  Storage storage;  // of the query; of the cache, where that is not quantised
  const SlotUnit* units;
  int64_t blocks, scored, width;  // of a list; entries of a row of scores, of a row in scratch
  void* scores;                   // (B, Hq, scored): exponentials above their block's maximum
  void* combined;                 // (B, Hq, blocks, width)
  BlockSum<double>* sums;         // (B, Hq, blocks)
  double* factors;                // (B, Hq, blocks)
  void* scratch;                  // of a thread: 2 (G, width) and (G, Z)
};

struct SparseDecodeRows {
  int64_t (*width)(const CachedAttention&, Storage);                       // of a row in scratch
  void (*blocks)(const SparseDecodeParams&, int64_t begin, int64_t end);   // units
  void (*outputs)(const SparseDecodeParams&, int64_t begin, int64_t end);  // (b, query head)
  void (*weights)(const SparseDecodeParams&, int64_t begin, int64_t end);  // (b, list, block)
};
TOKCORE_DECLARE_LEVELS(SparseDecodeRows, sparse_decode_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/slots.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

template <typename T>
void blocks_of(const SparseDecodeParams& p, int64_t begin, int64_t end) {
  using S = Acc<T>;
  const UnitRows<T> layout = UnitRows<T>::of(p);
  const int64_t group = p.group();
  S* const x = static_cast<S*>(p.scratch);
  S* const x_sums = x + group * layout.width;
  SlotBlock slots;
  int64_t loaded = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const auto [head, block] = p.units[unit];
    const int64_t b = head / p.heads, h = head % p.heads, list = p.list_of(b, h);
    const int64_t first = block * kSlotsOfBlock, query = head * group;
    const int64_t left = p.count[list] - first, n = left < kSlotsOfBlock ? left : kSlotsOfBlock;
    if (loaded != head) load_queries<T>(p, p.storage, layout, query, group, x, x_sums);
    loaded = head;
    slots.list(p.index == nullptr ? nullptr : p.index + list * p.listed, first, n);
    const bool quantized = p.key.quantization != nullptr;
    S* const scores = static_cast<S*>(p.scores) + query * p.scored + first;
    block_scores(slots, p.key.head<T>(b, h), p.key, quantized ? p.key.pairs(b, h) : nullptr, layout,
                 x, x_sums, group, S(p.scale), scores, p.scored);
    for (int64_t g = 0; g < group; ++g)
      p.sums[(query + g) * p.blocks + block] = block_exponentials(scores + g * p.scored, n);
    S* const combined = x_sums + group * layout.groups;
    for (int64_t d = 0; d < group * layout.width; ++d) combined[d] = 0;
    block_combination(slots, p.value.head<T>(b, h), p.value,
                      quantized ? p.value.pairs(b, h) : nullptr, layout, scores, p.scored, group,
                      combined);
    for (int64_t g = 0; g < group; ++g)
      std::memcpy(static_cast<S*>(p.combined) + ((query + g) * p.blocks + block) * layout.width,
                  combined + g * layout.width, size_t(layout.width) * sizeof(S));
  }
}

void blocks(const SparseDecodeParams& p, int64_t begin, int64_t end) {
  __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED);
  of_cache(p, p.storage, [&](auto entry) { blocks_of<decltype(entry)>(p, begin, end); });
}

template <typename T>
void outputs_of(const SparseDecodeParams& p, int64_t begin, int64_t end) {
  using S = Acc<T>;
  const UnitRows<T> layout = UnitRows<T>::of(p);
  S* const total = static_cast<S*>(p.scratch);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t list = p.list_of(head / p.query_heads, head % p.query_heads / p.group());
    const int64_t count = slot_blocks(p.count[list]);
    const auto merged = softmax_of_blocks(p.sums + head * p.blocks, count);
    static_cast<S*>(p.lse)[head] = count == 0 ? kLowest<S> : S(merged.lse());
    for (int64_t d = 0; d < layout.width; ++d) total[d] = 0;
    for (int64_t block = 0; block < count; ++block) {
      const int64_t at = head * p.blocks + block;
      p.factors[at] = merged.factor(p.sums[at]);
      const S factor = S(p.factors[at]);
      const S* const part = static_cast<const S*>(p.combined) + at * layout.width;
      for (int64_t d = 0; d < layout.width; ++d) total[d] += factor * part[d];
    }
    of_storage(p.storage, [&](auto entry) {
      using Q = decltype(entry);
      if constexpr (std::is_same<Acc<Q>, S>::value) {
        Q* const out = static_cast<Q*>(p.output) + head * p.dim;
        layout.for_each([&](int64_t entry, int64_t place) { from_acc(total[place], out + entry); });
      }
    });
  }
}

void outputs(const SparseDecodeParams& p, int64_t begin, int64_t end) {
  of_cache(p, p.storage, [&](auto entry) { outputs_of<decltype(entry)>(p, begin, end); });
}

template <typename S>
void weights_of(const SparseDecodeParams& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t list = unit / p.blocks, block = unit % p.blocks, first = block * kSlotsOfBlock;
    const int64_t last = first + kSlotsOfBlock < p.listed ? first + kSlotsOfBlock : p.listed;
    const int64_t used = p.count[list] < first  ? first
                         : p.count[list] < last ? p.count[list]
                                                : last;
    S* const out = static_cast<S*>(p.weight_row) + list * p.listed;
    for (int64_t j = first; j < last; ++j) out[j] = 0;
    for (int64_t head = list * p.sharing(); head < (list + 1) * p.sharing(); ++head) {
      if (used == first) break;
      const S* const scores = static_cast<const S*>(p.scores) + head * p.scored;
      const S factor = S(p.factors[head * p.blocks + block]);
      for (int64_t j = first; j < used; ++j) out[j] += factor * scores[j];
    }
  }
}

void weights(const SparseDecodeParams& p, int64_t begin, int64_t end) {
  if (p.storage == Storage::kDouble) return weights_of<double>(p, begin, end);
  weights_of<float>(p, begin, end);
}

}  // namespace

extern const SparseDecodeRows sparse_decode_rows = {row_width, blocks, outputs, weights};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "common/cached_attention_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

// The blocks that there are, list by list.
std::vector<SlotUnit> units_of(const CachedAttention& p) {
  std::vector<SlotUnit> units;
  for (int64_t head = 0; head < p.batch * p.heads; ++head) {
    const int64_t list = p.list_of(head / p.heads, head % p.heads);
    for (int64_t block = 0; block < slot_blocks(p.count[list]); ++block)
      units.push_back({head, block});
  }
  return units;
}

std::tuple<Tensor, Tensor, Tensor> sparse_decode_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& index,
    const Tensor& count, const std::optional<Tensor>& key_quantization,
    const std::optional<Tensor>& value_quantization, double scale) {
  const char* op = "sparse_decode_attention";
  const CachedCall call = checked_decode_call(op, query, key, value, index, count, key_quantization,
                                              value_quantization, scale);
  check_counts(op, call.tensors);
  check_listed_slots(op, call.tensors);
  SparseDecodeParams p{call.tensors, storage_of(query), nullptr, 0,       0,      0,
                       nullptr,      nullptr,           nullptr, nullptr, nullptr};
  Tensor output = new_empty(query, shape_of(query));
  Tensor weight_row = new_empty(query, {p.batch, p.lists, p.listed}, call.statistics);
  Tensor lse = new_empty(query, {p.batch, p.query_heads}, call.statistics);
  p.output = output.mutable_data_ptr();
  p.weight_row = weight_row.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  const SparseDecodeRows& rows = TOKCORE_CHOSEN(sparse_decode_rows);
  const std::vector<SlotUnit> units = units_of(p);
  const int64_t heads = p.batch * p.query_heads;
  p.units = units.data();
  p.blocks = slot_blocks(p.listed);
  p.scored = p.listed + kScoresBehind;
  p.width = rows.width(p, p.storage);
  // Through torch's allocator; nothing of it is cleared, as only what is used is touched.
  Tensor scores = new_empty(query, {heads * p.scored}, call.statistics);
  Tensor combined = new_empty(query, {heads * p.blocks * p.width}, call.statistics);
  const std::unique_ptr<BlockSum<double>[]> sums(new BlockSum<double>[heads * p.blocks]);
  const std::unique_ptr<double[]> factors(new double[heads * p.blocks]);
  p.scores = scores.mutable_data_ptr();
  p.combined = combined.mutable_data_ptr();
  p.sums = sums.get();
  p.factors = factors.get();
  const auto run = [&](auto units, int64_t number, int64_t elements) {
    parallel_units(number, elements, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<double[]> scratch(new double[p.group() * (2 * p.width + p.groups)]);
      SparseDecodeParams mine = p;
      mine.scratch = scratch.get();
      units(mine, begin, end);
    });
  };
  run(rows.blocks, int64_t(units.size()), kSlotsOfBlock * p.dim);
  run(rows.outputs, heads, (p.blocks + 1) * p.width);
  run(rows.weights, p.batch * p.lists * p.blocks, kSlotsOfBlock * p.sharing());
  return {output, weight_row, lse};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("sparse_decode_attention", TORCH_BOX(&tokcore::sparse_decode_attention_cpu));
}

#endif
