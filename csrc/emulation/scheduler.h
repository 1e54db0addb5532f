// Runs the blocks of a grid one after another, and the threads of a block as fibers, both in a
// random order that the seed fixes. A thread runs until it reaches a barrier or a warp function,
// waits there for the others, and whatever the rest of the program does in between is decided by
// the draw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulation/warp.h"

namespace tokcore {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs; the scheduler sets them.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// A place in the text of a kernel; as a default argument, the caller's.
struct Site {
  const char* file;
  int line;
  const char* function;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                             const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*call)(const void* closure);  // one thread of the kernel
  const void* closure;
  Site site;
};

// Throws std::runtime_error naming the launch, block, thread and what went wrong. One launch at a
// time in a process.
void run(const Launch& launch);

// What follows is called by threads of a kernel.

[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, const Site& site);

void block_barrier(const Site& site);

// Waits for every lane of the mask. A shuffle returns the value given by `source_lane`, a vote the
// lanes with a non-zero value, a sync nothing.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source_lane,
                         const Site& site);

// A point in a thread's run, fine enough to tell what synchronisation lies between two of them.
// Epoch 0 is before all.
struct Moment {
  uint64_t epoch;   // grows with every block and every __syncthreads
  uint32_t thread;  // within the block
  uint32_t clock;   // grows with every __syncwarp of the thread
};

extern Moment present;  // of the thread that runs

inline unsigned lane_index() { return present.thread % kWarpSize; }

bool ordered_within_warp(const Moment& moment);

inline bool happened_before_now(const Moment& moment) {
  return moment.epoch != present.epoch || moment.thread == present.thread ||
         ordered_within_warp(moment);
}

std::string thread_name(uint32_t thread);  // "thread (1, 2, 3)"

}  // namespace emulation
}  // namespace tokcore
