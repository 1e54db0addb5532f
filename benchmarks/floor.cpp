// What the machine allows for the bytes and exponentials of one operator: plain streaming reads,
// non-temporal writes, and an exponential fed from the first-level cache. Compiled by floors.py
// with the system compiler on the machine that is measured (-march=native), so that a floor never
// lags behind what the hardware can do. No part of the library.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t kLine = 64;  // bytes of a cache line, and of one AVX-512 register

typedef std::uint64_t Line __attribute__((vector_size(kLine)));

inline Line load(const void* source, std::size_t index) {
  return static_cast<const Line*>(source)[index];
}

// Past the caches: a plain store first reads the line it is about to overwrite.
inline void stream(Line* to, Line value) {
#if defined(__AVX512F__)
  __m512i bits;
  std::memcpy(&bits, &value, kLine);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(__SSE2__)
  __m128i parts[4];
  std::memcpy(parts, &value, kLine);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
#else
  *to = value;
#endif
}

// exp(x) for x <= 0: Cody-Waite reduction and a degree-5 polynomial, the least work that keeps
// float32 accuracy.
inline float exp_negative(float x) {
  const float n = std::nearbyint(x * 1.44269504f);
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const std::int32_t scale = (static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &scale, sizeof power);
  return p * power;
}

}  // namespace

extern "C" {

// One pass over `count` arrays of `bytes` each, side by side as a two-tensor kernel reads them. The
// result only keeps the compiler from dropping the loads.
std::uint64_t floor_read(const void* const* sources, int count, std::size_t bytes, int threads) {
  const std::size_t lines = bytes / kLine;
  std::uint64_t result = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : result)
  for (int part = 0; part < threads; ++part) {
    const std::size_t end = lines * (part + 1) / threads;
    Line a{}, b{}, c{}, d{};
    std::size_t i = lines * part / threads;
    for (; i + 4 <= end; i += 4) {
      for (int s = 0; s < count; ++s) {
        a ^= load(sources[s], i);
        b ^= load(sources[s], i + 1);
        c ^= load(sources[s], i + 2);
        d ^= load(sources[s], i + 3);
      }
    }
    for (; i < end; ++i) {
      for (int s = 0; s < count; ++s) a ^= load(sources[s], i);
    }
    a ^= b ^ c ^ d;
    for (int lane = 0; lane < 8; ++lane) result ^= a[lane];
  }
  return result;
}

// One pass that reads `count` arrays and writes one (count 0: fills it with zeros).
void floor_write(const void* const* sources, int count, std::size_t bytes, void* destination,
                 int threads) {
  const std::size_t lines = bytes / kLine;
  Line* const to = static_cast<Line*>(destination);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    const std::size_t end = lines * (part + 1) / threads;
    for (std::size_t i = lines * part / threads; i < end; ++i) {
      Line value{};
      for (int s = 0; s < count; ++s) value ^= load(sources[s], i);
      stream(to + i, value);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }
}

// `repeats` passes of sum(exp(x - max)) over a block that stays in the first-level cache, on every
// thread.
float floor_exp(const float* block, int length, std::int64_t repeats, int threads) {
  float total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
  for (int part = 0; part < threads; ++part) {
    for (std::int64_t r = 0; r < repeats; ++r) {
      const float shift =
          static_cast<float>(r & 7);  // a new argument each pass, or the pass is hoisted
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < length; ++i) sum += exp_negative(block[i] - shift);
      total += sum;
    }
  }
  return total;
}

}  // extern "C"
