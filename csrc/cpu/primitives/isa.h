// Which instruction set runs: one of the levels compiled in, chosen once per process.
#pragma once

#include <cstdint>

namespace tokcore {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best level that the processor has, or the one that TOKCORE_ISA (baseline, avx2, avx512)
// names. Throws when the name is unknown or the processor lacks the level.
Isa chosen_isa();

}  // namespace tokcore

// Calls that each level has answered, by Isa: counted inside the rows, so that a test sees which
// copy really ran.
extern "C" {
extern int64_t tokcore_isa_calls[3];
}

// The level's entry of a table of row functions (each level defines one `name` in its namespace).
#if defined(TOKCORE_X86_LEVELS)
#define TOKCORE_DECLARE_LEVELS(Table, name) \
  namespace avx512 {                        \
  extern const Table name;                  \
  }                                         \
  namespace avx2 {                          \
  extern const Table name;                  \
  }                                         \
  namespace baseline {                      \
  extern const Table name;                  \
  }
#define TOKCORE_CHOSEN(name)                                         \
  (::tokcore::chosen_isa() == ::tokcore::Isa::kAvx512 ? avx512::name \
   : ::tokcore::chosen_isa() == ::tokcore::Isa::kAvx2 ? avx2::name   \
                                                      : baseline::name)
#else
#define TOKCORE_DECLARE_LEVELS(Table, name) \
  namespace baseline {                      \
  extern const Table name;                  \
  }
#define TOKCORE_CHOSEN(name) (static_cast<void>(::tokcore::chosen_isa()), baseline::name)
#endif
