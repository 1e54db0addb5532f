// Structs of doubles as what they are, so that sums of many fields are written once.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#define TOKCORE_FIELDS_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_FIELDS_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

template <typename Sums>
constexpr int kFields = sizeof(Sums) / sizeof(double);

template <typename Sums>
TOKCORE_FIELDS_HD void add_fields(const Sums& from, Sums& to) {
  double a[kFields<Sums>], b[kFields<Sums>];
  memcpy(a, &from, sizeof from);
  memcpy(b, &to, sizeof to);
  for (int i = 0; i < kFields<Sums>; ++i) b[i] += a[i];
  memcpy(static_cast<void*>(&to), b, sizeof to);
}

}  // namespace
}  // namespace tokcore
