// The weights that the last tokens of a prompt give to the slots of a cache, summed over heads. A
// unit is a few queries of a list: heads are taken in their order, the scores of a head's queries
// are found block by block, become exponentials, and are added to the rows.
//
// The file is compiled once as the front (torch: checks, allocation, threads) and once per
// instruction set as the rows.
#include "common/cached_attention.h"
#include "cpu/primitives/blocks.h"
#include "cpu/primitives/isa.h"
#include "cpu/primitives/slot_blocks.h"

namespace tokcore {

struct PromptScoresParams : CachedAttention {
  Storage storage;          // of the query; of the cache, where that is not quantised
  int64_t together, tiles;  // queries of a unit, and units of a list
  int64_t scored;           // entries of a row of scores
  void* scratch;            // of a thread: scores (G * together, scored), queries and their sums
  BlockSum<double>* sums;   // of a thread: (blocks,)
};

struct PromptScoresRows {
  int64_t (*width)(const CachedAttention&, Storage);                    // of a row in scratch
  void (*rows)(const PromptScoresParams&, int64_t begin, int64_t end);  // (b, list, tile)
};
TOKCORE_DECLARE_LEVELS(PromptScoresRows, prompt_scores_rows)

}  // namespace tokcore

#if defined(TOKCORE_ISA)

#include "cpu/primitives/slots.h"

namespace tokcore {
namespace TOKCORE_ISA {
namespace {

// The exponentials of n scores, block by block, become weights that are added to out.
template <typename S>
void add_weights(const PromptScoresParams& p, S* scores, int64_t n, S* out) {
  for (int64_t first = 0; first < n; first += kSlotsOfBlock) {
    const int64_t here = n - first < kSlotsOfBlock ? n - first : kSlotsOfBlock;
    p.sums[first / kSlotsOfBlock] = block_exponentials(scores + first, here);
  }
  const auto merged = softmax_of_blocks(p.sums, slot_blocks(n));
  for (int64_t first = 0; first < n; first += kSlotsOfBlock) {
    const int64_t end = first + kSlotsOfBlock < n ? first + kSlotsOfBlock : n;
    const S factor = S(merged.factor(p.sums[first / kSlotsOfBlock]));
    for (int64_t j = first; j < end; ++j) out[j] += factor * scores[j];
  }
}

template <typename T>
void rows_of(const PromptScoresParams& p, int64_t begin, int64_t end) {
  using S = Acc<T>;
  const UnitRows<T> layout = UnitRows<T>::of(p);
  S* const scores = static_cast<S*>(p.scratch);
  S* const x = scores + p.group() * p.together * p.scored;
  S* const x_sums = x + p.group() * p.together * layout.width;
  SlotBlock slots;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t list = unit / p.tiles, b = list / p.lists, first = unit % p.tiles * p.together;
    const int64_t left = p.queries - first, n = left < p.together ? left : p.together;
    S* const out = static_cast<S*>(p.rows) + (list * p.queries + first) * p.capacity;
    for (int64_t j = 0; j < n * p.capacity; ++j) out[j] = 0;
    const int64_t seen = p.seen(p.count[list], first + n - 1);
    const int64_t h_first = p.lists == 1 ? 0 : list % p.lists,
                  h_end = p.lists == 1 ? p.heads : h_first + 1;
    for (int64_t h = h_first; seen > 0 && h < h_end; ++h) {
      const int64_t head = (b * p.heads + h) * p.group();
      for (int64_t g = 0; g < p.group(); ++g)
        load_queries<T>(p, p.storage, layout, (head + g) * p.queries + first, n,
                        x + g * n * layout.width, x_sums + g * n * layout.groups);
      const float* const pairs = p.key.quantization == nullptr ? nullptr : p.key.pairs(b, h);
      for (int64_t from = 0; from < seen; from += kSlotsOfBlock) {
        slots.list(nullptr, from, seen - from < kSlotsOfBlock ? seen - from : kSlotsOfBlock);
        block_scores(slots, p.key.head<T>(b, h), p.key, pairs, layout, x, x_sums, p.group() * n,
                     S(p.scale), scores + from, p.scored);
      }
      for (int64_t g = 0; g < p.group(); ++g)
        for (int64_t i = 0; i < n; ++i)
          add_weights(p, scores + (g * n + i) * p.scored, p.seen(p.count[list], first + i),
                      out + i * p.capacity);
    }
  }
}

void rows(const PromptScoresParams& p, int64_t begin, int64_t end) {
  __atomic_fetch_add(&tokcore_isa_calls[TOKCORE_ISA_NUMBER], 1, __ATOMIC_RELAXED);
  of_cache(p, p.storage, [&](auto entry) { rows_of<decltype(entry)>(p, begin, end); });
}

}  // namespace

extern const PromptScoresRows prompt_scores_rows = {row_width, rows};

}  // namespace TOKCORE_ISA
}  // namespace tokcore

#else  // the front

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "common/cached_attention_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

// Query rows of a unit: keys are widened once for all of them, and their scores stay in a cache.
constexpr int64_t kRowsOfUnit = 16;

Tensor prompt_window_scores_cpu(const Tensor& query, const Tensor& key, const Tensor& count,
                                const std::optional<Tensor>& key_quantization, double scale) {
  const char* op = "prompt_window_scores";
  const CachedCall call = checked_cached_call(op, query, key, count, key_quantization, true, scale);
  check_counts(op, call.tensors);
  PromptScoresParams p{call.tensors, storage_of(query), 0, 0, 0, nullptr, nullptr};
  Tensor out =
      torch::stable::new_empty(query, {p.batch, p.lists, p.queries, p.capacity}, call.statistics);
  p.CachedAttention::rows = out.mutable_data_ptr();
  p.together = std::max<int64_t>(1, kRowsOfUnit / p.group());
  p.tiles = (p.queries + p.together - 1) / p.together;
  p.scored = p.capacity + kScoresBehind;
  const PromptScoresRows& rows = TOKCORE_CHOSEN(prompt_scores_rows);
  const int64_t of_unit = p.group() * p.together, width = rows.width(p, p.storage);
  parallel_units(p.batch * p.lists * p.tiles, of_unit * p.capacity,
                 [&](int64_t begin, int64_t end) {
                   const std::unique_ptr<double[]> scratch(
                       new double[of_unit * (p.scored + width + p.groups)]);
                   const std::unique_ptr<BlockSum<double>[]> sums(
                       new BlockSum<double>[slot_blocks(p.capacity) + 1]);
                   PromptScoresParams mine = p;
                   mine.scratch = scratch.get();
                   mine.sums = sums.get();
                   rows.rows(mine, begin, end);
                 });
  return out;
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("prompt_window_scores", TORCH_BOX(&tokcore::prompt_window_scores_cpu));
}

#endif
