// How the slots of a key-value cache are cut: what fronts and rows both know.
#pragma once

#include <cstdint>

namespace tokcore {

// Slots that are reduced as one block, a constant so that no result depends on the threads. Of 128
// bfloat16 entries a block's keys and values fill half a second level cache of 512 KB.
constexpr int64_t kSlotsOfBlock = 512;
__attribute__((always_inline)) constexpr int64_t slot_blocks(int64_t slots) {
  return (slots + kSlotsOfBlock - 1) / kSlotsOfBlock;
}
// Entries that a vector may write behind the last of a row of scores.
constexpr int64_t kScoresBehind = 16;

// A block of the slots that query heads of a KV head attend to.
struct SlotUnit {
  int64_t head, block;  // head: b * Hkv + h
};

}  // namespace tokcore
