// Which slots a query attends to: the last, the first, and those of the greatest scores between. A
// radix select finds the least score that is taken, among ever fewer candidates, and one more pass
// writes the slots in their order; nothing is sorted. Table look-ups are no work for vectors, so
// the rows of the levels are empty.
#if !defined(TOKCORE_ISA)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/window_select_call.h"
#include "cpu/primitives/parallel.h"

namespace tokcore {
namespace {

using torch::stable::new_empty;

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;  // a table of 16 KB

// Keys above `key` are taken, and the first `ties` that are equal to it.
struct Threshold {
  uint64_t key;
  int64_t ties;
};

// For the `wanted` >= 1 greatest of n > wanted candidates, which are written over. Two tallies in
// turn: neighbours often agree, and an addition would wait for the one before it.
Threshold threshold_of(uint64_t* keys, int64_t n, int64_t wanted, int32_t* tally) {
  int32_t *const even = tally, *const odd = tally + kDigits;
  while (true) {
    uint64_t different = 0;
    for (int64_t j = 1; j < n; ++j) different |= keys[j] ^ keys[0];
    if (different == 0) return {keys[0], wanted};
    const int shift = std::max(0, 64 - __builtin_clzll(different) - kDigitBits);
    const auto digit = [&](uint64_t key) { return key >> shift & (kDigits - 1); };
    std::fill_n(tally, 2 * kDigits, 0);
    for (int64_t j = 0; j + 1 < n; j += 2) {
      ++even[digit(keys[j])];
      ++odd[digit(keys[j + 1])];
    }
    if (n % 2 != 0) ++even[digit(keys[n - 1])];
    uint64_t least = kDigits - 1;
    for (; even[least] + odd[least] < wanted; --least) wanted -= even[least] + odd[least];
    const int64_t kept = even[least] + odd[least];
    // All of them are taken: so is every key from the digit's least one on.
    if (kept == wanted)
      return {((keys[0] >> shift & ~uint64_t(kDigits - 1)) | least) << shift, kept};
    int64_t next = 0;
    for (int64_t j = 0; j < n; ++j) {
      const uint64_t key = keys[j];
      keys[next] = key;
      next += digit(key) == least;
    }
    n = kept;
  }
}

void select_list(const SelectTensors& p, int64_t list, std::vector<uint64_t>& keys,
                 std::vector<int32_t>& tally) {
  const Selection chosen = p.selection(list);
  const int64_t* score = p.score + list * p.sizes.slots;
  int32_t *const index = p.index + list * p.size, *next = index;
  for (int64_t j = 0; j < chosen.first; ++j) *next++ = int32_t(j);
  const int64_t between = chosen.last - chosen.first;
  Threshold least = {0, between};  // takes them all
  if (chosen.ranked > 0 && chosen.ranked < between) {
    keys.resize(between);
    for (int64_t j = 0; j < between; ++j) keys[j] = score_key(score[chosen.first + j]);
    least = threshold_of(keys.data(), between, chosen.ranked, tally.data());
  }
  int32_t* const full = next + chosen.ranked;
  for (int64_t j = chosen.first; next < full; ++j) {
    const uint64_t key = score_key(score[j]);
    const bool equal = key == least.key;
    *next = int32_t(j);
    next += key > least.key || (equal && least.ties > 0);
    least.ties -= equal;
  }
  for (int64_t j = chosen.last; j < chosen.count; ++j) *next++ = int32_t(j);
  p.selected[list] = int32_t(next - index);
  std::fill(next, index + p.size, -1);
}

void check_values(const char* op, const SelectTensors& p) {
  check_counts(op, p.count, p.sizes, p.sizes.slots);
  check_not_negative(op, "local", p.local, p.sizes.batch);
  check_not_negative(op, "top", p.top, p.sizes.batch);
  for (int64_t b = 0; b < p.sizes.batch; ++b)
    check(int64_t(p.local[b]) + p.top[b] + p.sinks <= p.size, op,
          "size must hold local + top + sinks = ", int64_t(p.local[b]) + p.top[b] + p.sinks,
          " in row ", b, ", got ", p.size);
}

std::tuple<Tensor, Tensor> window_select_cpu(const Tensor& score, const Tensor& count,
                                             const Tensor& local, const Tensor& top, int64_t size,
                                             int64_t sinks) {
  const char* op = "window_select";
  SelectCall call = checked_select(op, score, count, local, top, size, sinks);
  SelectTensors& p = call.p;
  check_values(op, p);
  Tensor index = new_empty(score, with_last(call.lists(), size), ScalarType::Int);
  Tensor selected = new_empty(score, call.lists(), ScalarType::Int);
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.selected = static_cast<int32_t*>(selected.mutable_data_ptr());
  parallel_units(p.sizes.all_lists(), p.sizes.slots + size, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    std::vector<int32_t> tally(2 * kDigits);
    for (int64_t list = begin; list < end; ++list) select_list(p, list, keys, tally);
  });
  return {index, selected};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(tokcore, CPU, m) {
  m.impl("window_select", TORCH_BOX(&tokcore::window_select_cpu));
}

#endif
