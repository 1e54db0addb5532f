// Slots that are no longer needed taken out of every tensor of the state, in place. What stays
// moves forward in runs of neighbouring slots, each a memmove: nothing here is worth an instruction
// set of its own, so the rows of the levels are empty.
#if !defined(TOKCORE_ISA)

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "common/kv_compact_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

// Slots [from, from + size) go to [to, to + size), to <= from.
struct Run {
  int64_t from, to, size;
};

// How the slots of a list move: runs in ascending order, and how many slots are left.
struct Moves {
  std::vector<Run> runs;
  int64_t before = 0, after = 0;
};

Moves moves_of(const KvCompact& p, int64_t list) {
  Moves moves;
  moves.before = p.count[list];
  for (int64_t j = 0; j < moves.before; ++j) {
    if (!p.keeps_slot(list, j)) continue;
    if (moves.runs.empty() || moves.runs.back().from + moves.runs.back().size != j)
      moves.runs.push_back({j, moves.after, 0});
    ++moves.runs.back().size;
    ++moves.after;
  }
  return moves;
}

void move_row(const Moved& tensor, int64_t row, int64_t slots, const Moves& moves) {
  char* data = tensor.row(row, slots);
  const int64_t bytes = tensor.slot_bytes;
  for (const Run& run : moves.runs)
    if (run.to < run.from)
      std::memmove(data + run.to * bytes, data + run.from * bytes, run.size * bytes);
  if (tensor.left != Moved::kAsItIs && moves.after < moves.before)
    std::memset(data + moves.after * bytes, tensor.left, (moves.before - moves.after) * bytes);
}

void kv_compact_cpu(Tensor key, Tensor value, Tensor position, Tensor score, Tensor ring,
                    Tensor last_selected, Tensor count, const Tensor& since, const Tensor& local,
                    int64_t sinks, std::optional<Tensor> key_quantization,
                    std::optional<Tensor> value_quantization) {
  const char* op = "kv_compact";
  const KvCompactCall call =
      checked_compact(op, key, value, position, score, ring, last_selected, count, since, local,
                      sinks, key_quantization, value_quantization);
  const KvCompact& p = call.p;
  check_counts(op, p.count, p.sizes, p.sizes.slots);
  check_not_negative(op, "local", p.local, p.sizes.batch);
  std::vector<Moves> moves(p.sizes.all_lists());
  parallel_units(p.sizes.all_lists(), p.sizes.slots, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list) moves[list] = moves_of(p, list);
  });
  for (int t = 0; t < p.moved; ++t) {
    const Moved& tensor = p.tensors[t];
    parallel_units(tensor.rows, p.sizes.slots * tensor.slot_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        move_row(tensor, row, p.sizes.slots, moves[row / tensor.rows_of_list]);
    });
  }
  for (int64_t list = 0; list < p.sizes.all_lists(); ++list)
    p.count[list] = int32_t(moves[list].after);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("kv_compact", TORCH_BOX(&tokcore::kv_compact_cpu));
}

#endif
