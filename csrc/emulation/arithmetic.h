// CUDA's arithmetic that a host compiler does not know. The approximate functions are the exact
// ones here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tokcore {

// Overloads rather than a template, so that an element of shared memory converts. As in CUDA, of a
// number and a NaN both give the number.
#define TOKCORE_MIN_MAX(T)                         \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
TOKCORE_MIN_MAX(int)
TOKCORE_MIN_MAX(unsigned)
TOKCORE_MIN_MAX(long)
TOKCORE_MIN_MAX(unsigned long)
TOKCORE_MIN_MAX(long long)
TOKCORE_MIN_MAX(unsigned long long)
#undef TOKCORE_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

}  // namespace tokcore
