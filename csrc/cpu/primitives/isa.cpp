#include "cpu/primitives/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

int64_t tokcore_isa_calls[3] = {0, 0, 0};

namespace tokcore {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa isa) {
#if defined(TOKCORE_X86_LEVELS)
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C, which clang cannot ask for by name.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::kBaseline;
}

Isa choose() {
  const char* asked = std::getenv("TOKCORE_ISA");
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline}) {
    const char* name = kNames[static_cast<int>(isa)];
    if (asked != nullptr && *asked != '\0' && std::strcmp(asked, name) != 0) continue;
    if (supported(isa)) return isa;
    if (asked != nullptr && *asked != '\0')
      throw std::runtime_error(std::string("tokcore: TOKCORE_ISA=") + name +
                               " is not supported by this processor or build");
  }
  throw std::runtime_error(
      std::string("tokcore: TOKCORE_ISA must be avx512, avx2 or baseline, got '") + asked + "'");
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace tokcore

// ---- for tokcore.build_info(), through ctypes
// --------------------------------------------------------------------------

#define TOKCORE_EXPORT extern "C" __attribute__((visibility("default")))

// The level in use, or the reason why there is none, which starts with "tokcore:".
TOKCORE_EXPORT const char* tokcore_cpu_isa() {
  static std::string answer;
  try {
    return tokcore::kNames[static_cast<int>(tokcore::chosen_isa())];
  } catch (const std::exception& error) {
    answer = error.what();
    return answer.c_str();
  }
}

TOKCORE_EXPORT const char* tokcore_cpu_isas() {
  static const std::string all = [] {
    std::string names;
    for (const tokcore::Isa isa :
         {tokcore::Isa::kBaseline, tokcore::Isa::kAvx2, tokcore::Isa::kAvx512})
      if (tokcore::supported(isa))
        names += (names.empty() ? "" : " ") + std::string(tokcore::kNames[static_cast<int>(isa)]);
    return names;
  }();
  return all.c_str();
}

TOKCORE_EXPORT int64_t tokcore_cpu_isa_calls(const char* level) {
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(level, tokcore::kNames[i]) == 0)
      return __atomic_load_n(&tokcore_isa_calls[i], __ATOMIC_RELAXED);
  return -1;
}

// The CUDA architectures that libtokcore_cuda.so was built for beside this library; empty when it
// was built without.
TOKCORE_EXPORT const char* tokcore_cuda_architectures() { return TOKCORE_CUDA_BUILT_FOR; }
