// Vectors of one instruction set: the only file with intrinsics. It is included by operator files
// that are compiled once per level with TOKCORE_ISA (the namespace) and one of TOKCORE_ISA_AVX512,
// TOKCORE_ISA_AVX2 or neither set.
//
// Everything here and in the rows is internal to its object file: an inline function with external
// linkage would be merged by the linker across levels, and the AVX-512 copy might be the one that
// runs on every CPU.
//
// Memory is walked in units of two vectors. For bfloat16 the two vectors are the even and the odd
// entries of the unit (a shift and a mask instead of two widening shuffles); sums and maxima do not
// care, and a store puts them back.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(TOKCORE_ISA_AVX512) || defined(TOKCORE_ISA_AVX2)
#include <immintrin.h>
#endif

#define TOKCORE_INLINE static inline __attribute__((always_inline))

namespace tokcore {
namespace TOKCORE_ISA {

// Storage types of half precision; only their bits matter here.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

TOKCORE_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
TOKCORE_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

// ---- one element
// -----------------------------------------------------------------------------------------------------

TOKCORE_INLINE float to_acc(float x) { return x; }
TOKCORE_INLINE double to_acc(double x) { return x; }
TOKCORE_INLINE float to_acc(Bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
TOKCORE_INLINE float to_acc(Fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place a subnormal is off by the implicit one; the multiplication repairs the
  // exponent exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

TOKCORE_INLINE void from_acc(float x, float* out) { *out = x; }
TOKCORE_INLINE void from_acc(double x, double* out) { *out = x; }
TOKCORE_INLINE void from_acc(float x, Bf16* out) {
  const uint32_t bits = float_to_bits(x);
  // Round to nearest even; a NaN keeps its top bits and stays a NaN.
  out->bits =
      x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
TOKCORE_INLINE void from_acc(float x, Fp16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x47800000) {  // 65536 and up
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude <
             0x38800000) {  // below 2^-14: let float addition round at the subnormal's last bit
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
  } else {
    out->bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
#endif
}

// ---- vectors of the accumulation type
// --------------------------------------------------------------------------------

// GCC's and clang's portable vectors: the baseline, and double at every level.
template <typename S, typename I>
struct Portable {
  typedef S Values __attribute__((vector_size(16)));
  typedef I Mask __attribute__((vector_size(16)));
  using Scalar = S;
  static constexpr int kWidth = 16 / sizeof(S);
  Values v;

  TOKCORE_INLINE Portable all(S x) { return {x - Values{}}; }
};
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> operator+(Portable<S, I> a, Portable<S, I> b) {
  return {a.v + b.v};
}
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> operator-(Portable<S, I> a, Portable<S, I> b) {
  return {a.v - b.v};
}
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> operator*(Portable<S, I> a, Portable<S, I> b) {
  return {a.v * b.v};
}
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> operator/(Portable<S, I> a, Portable<S, I> b) {
  return {a.v / b.v};
}
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> fma(Portable<S, I> a, Portable<S, I> b, Portable<S, I> c) {
  return {a.v * b.v + c.v};
}
template <typename S, typename I>
TOKCORE_INLINE typename Portable<S, I>::Mask operator<(Portable<S, I> a, Portable<S, I> b) {
  return typename Portable<S, I>::Mask(a.v < b.v);
}
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> select(typename Portable<S, I>::Mask m, Portable<S, I> a,
                                     Portable<S, I> b) {
  return {m ? a.v : b.v};
}
// The larger of x and known; a NaN in x is passed over, so that a maximum is always a number.
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> max_number(Portable<S, I> x, Portable<S, I> known) {
  return {x.v > known.v ? x.v : known.v};
}
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> abs(Portable<S, I> a) {
  return {a.v < 0 ? -a.v : a.v};
}

// The larger of x and floor; here a NaN in x stays.
template <typename S, typename I>
TOKCORE_INLINE Portable<S, I> max_or_nan(Portable<S, I> x, Portable<S, I> floor) {
  return {x.v < floor.v ? floor.v : x.v};
}

using DoubleVec = Portable<double, int64_t>;

#if defined(TOKCORE_ISA_AVX512)

struct FloatVec {
  using Mask = __mmask16;
  using Scalar = float;
  static constexpr int kWidth = 16;
  __m512 v;
  TOKCORE_INLINE FloatVec all(float x) { return {_mm512_set1_ps(x)}; }
};
TOKCORE_INLINE FloatVec operator+(FloatVec a, FloatVec b) { return {_mm512_add_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec operator-(FloatVec a, FloatVec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec operator*(FloatVec a, FloatVec b) { return {_mm512_mul_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec operator/(FloatVec a, FloatVec b) { return {_mm512_div_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
TOKCORE_INLINE __mmask16 operator<(FloatVec a, FloatVec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}
TOKCORE_INLINE FloatVec select(__mmask16 m, FloatVec a, FloatVec b) {
  return {_mm512_mask_blend_ps(m, b.v, a.v)};
}
// maxps returns its second operand when either is NaN.
TOKCORE_INLINE FloatVec max_number(FloatVec x, FloatVec known) {
  return {_mm512_max_ps(x.v, known.v)};
}
TOKCORE_INLINE FloatVec max_or_nan(FloatVec x, FloatVec floor) {
  return {_mm512_max_ps(floor.v, x.v)};
}
TOKCORE_INLINE FloatVec abs(FloatVec a) { return {_mm512_abs_ps(a.v)}; }
TOKCORE_INLINE float reduce_add(FloatVec a) { return _mm512_reduce_add_ps(a.v); }
TOKCORE_INLINE float reduce_max(FloatVec a) { return _mm512_reduce_max_ps(a.v); }

TOKCORE_INLINE void load2(const float* p, FloatVec& a, FloatVec& b) {
  a.v = _mm512_loadu_ps(p);
  b.v = _mm512_loadu_ps(p + 16);
}
TOKCORE_INLINE void load2(const Bf16* p, FloatVec& a, FloatVec& b) {
  const __m512i both = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
}
TOKCORE_INLINE void load2(const Fp16* p, FloatVec& a, FloatVec& b) {
  a.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
TOKCORE_INLINE __m512i bf16_bits(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits,
                              _mm512_set1_epi32(0x400000));
}
TOKCORE_INLINE __m512i pack(FloatVec a, FloatVec b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bf16_bits(a.v), 16), bf16_bits(b.v));
}
TOKCORE_INLINE __m512i pack_half(FloatVec a, FloatVec b) {
  const __m256i low = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                            _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT), 1);
}
TOKCORE_INLINE void store2(float* p, FloatVec a, FloatVec b) {
  _mm512_storeu_ps(p, a.v);
  _mm512_storeu_ps(p + 16, b.v);
}
TOKCORE_INLINE void store2(Bf16* p, FloatVec a, FloatVec b) { _mm512_storeu_si512(p, pack(a, b)); }
TOKCORE_INLINE void store2(Fp16* p, FloatVec a, FloatVec b) {
  _mm512_storeu_si512(p, pack_half(a, b));
}
TOKCORE_INLINE void stream2(float* p, FloatVec a, FloatVec b) {
  _mm512_stream_ps(p, a.v);
  _mm512_stream_ps(p + 16, b.v);
}
TOKCORE_INLINE void stream2(Bf16* p, FloatVec a, FloatVec b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack(a, b));
}
TOKCORE_INLINE void stream2(Fp16* p, FloatVec a, FloatVec b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_half(a, b));
}

TOKCORE_INLINE FloatVec round_even(FloatVec x) { return {_mm512_roundscale_ps(x.v, 0)}; }
// p * 2^n; scalef underflows to 0 by itself.
constexpr float kExp2Floor = -150.0f;
TOKCORE_INLINE FloatVec scale2(FloatVec p, FloatVec n) { return {_mm512_scalef_ps(p.v, n.v)}; }

#elif defined(TOKCORE_ISA_AVX2)

struct FloatVec {
  struct Mask {
    __m256 v;
  };
  using Scalar = float;
  static constexpr int kWidth = 8;
  __m256 v;
  TOKCORE_INLINE FloatVec all(float x) { return {_mm256_set1_ps(x)}; }
};
TOKCORE_INLINE FloatVec operator+(FloatVec a, FloatVec b) { return {_mm256_add_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec operator-(FloatVec a, FloatVec b) { return {_mm256_sub_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec operator*(FloatVec a, FloatVec b) { return {_mm256_mul_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec operator/(FloatVec a, FloatVec b) { return {_mm256_div_ps(a.v, b.v)}; }
TOKCORE_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
TOKCORE_INLINE FloatVec::Mask operator<(FloatVec a, FloatVec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
TOKCORE_INLINE FloatVec select(FloatVec::Mask m, FloatVec a, FloatVec b) {
  return {_mm256_blendv_ps(b.v, a.v, m.v)};
}
// maxps returns its second operand when either is NaN.
TOKCORE_INLINE FloatVec max_number(FloatVec x, FloatVec known) {
  return {_mm256_max_ps(x.v, known.v)};
}
TOKCORE_INLINE FloatVec max_or_nan(FloatVec x, FloatVec floor) {
  return {_mm256_max_ps(floor.v, x.v)};
}
TOKCORE_INLINE FloatVec abs(FloatVec a) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))};
}

TOKCORE_INLINE void load2(const float* p, FloatVec& a, FloatVec& b) {
  a.v = _mm256_loadu_ps(p);
  b.v = _mm256_loadu_ps(p + 8);
}
TOKCORE_INLINE void load2(const Bf16* p, FloatVec& a, FloatVec& b) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
}
TOKCORE_INLINE void load2(const Fp16* p, FloatVec& a, FloatVec& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
TOKCORE_INLINE __m256i bf16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
}
TOKCORE_INLINE __m256i pack(FloatVec a, FloatVec b) {
  return _mm256_blend_epi16(_mm256_srli_epi32(bf16_bits(a.v), 16), bf16_bits(b.v), 0xaa);
}
TOKCORE_INLINE __m256i pack_half(FloatVec a, FloatVec b) {
  const __m128i low = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                 _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT), 1);
}
TOKCORE_INLINE void store2(float* p, FloatVec a, FloatVec b) {
  _mm256_storeu_ps(p, a.v);
  _mm256_storeu_ps(p + 8, b.v);
}
TOKCORE_INLINE void store2(Bf16* p, FloatVec a, FloatVec b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(a, b));
}
TOKCORE_INLINE void store2(Fp16* p, FloatVec a, FloatVec b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_half(a, b));
}
TOKCORE_INLINE void stream2(float* p, FloatVec a, FloatVec b) {
  _mm256_stream_ps(p, a.v);
  _mm256_stream_ps(p + 8, b.v);
}
TOKCORE_INLINE void stream2(Bf16* p, FloatVec a, FloatVec b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(a, b));
}
TOKCORE_INLINE void stream2(Fp16* p, FloatVec a, FloatVec b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_half(a, b));
}

TOKCORE_INLINE FloatVec round_even(FloatVec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n through the exponent bits. At the floor p is 1 and its bits come out as 0; what NaN
// converts to is shifted out, so that a NaN in p stays.
constexpr float kExp2Floor = -127.0f;
TOKCORE_INLINE FloatVec scale2(FloatVec p, FloatVec n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), shifted))};
}

#else

using FloatVec = Portable<float, int32_t>;
constexpr float kExp2Floor = -127.0f;
// Without SSE4 rounding is a library call; adding and subtracting 1.5 * 2^23 rounds what is below
// 2^22.
TOKCORE_INLINE FloatVec round_even(FloatVec x) {
  const FloatVec magic = FloatVec::all(0x1.8p23f);
  return (x + magic) - magic;
}
// As on AVX2.
TOKCORE_INLINE FloatVec scale2(FloatVec p, FloatVec n) {
  FloatVec::Mask bits;
  std::memcpy(&bits, &p.v, sizeof bits);
  bits += __builtin_convertvector(n.v, FloatVec::Mask) << 23;
  std::memcpy(&p.v, &bits, sizeof bits);
  return p;
}

#endif

#if !defined(TOKCORE_ISA_AVX512)
// A fixed tree of halves, so that the order of additions is part of the level's definition.
template <typename V>
TOKCORE_INLINE typename V::Scalar reduce_add(V a) {
  typename V::Scalar lane[V::kWidth];
  std::memcpy(lane, &a.v, sizeof lane);
  for (int half = V::kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
template <typename V>
TOKCORE_INLINE typename V::Scalar reduce_max(V a) {
  typename V::Scalar lane[V::kWidth];
  std::memcpy(lane, &a.v, sizeof lane);
  for (int i = 1; i < V::kWidth; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
  return lane[0];
}
#else
TOKCORE_INLINE double reduce_add(DoubleVec a) { return a.v[0] + a.v[1]; }
TOKCORE_INLINE double reduce_max(DoubleVec a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }
#endif

// Portable units: element by element where the storage type is not the vector's own.
template <typename S, typename I, typename T>
TOKCORE_INLINE void load2(const T* p, Portable<S, I>& a, Portable<S, I>& b) {
  constexpr int w = Portable<S, I>::kWidth;
  S entries[2 * w];
  for (int i = 0; i < 2 * w; ++i) entries[i] = to_acc(p[i]);
  std::memcpy(&a.v, entries, sizeof a.v);
  std::memcpy(&b.v, entries + w, sizeof b.v);
}
template <typename S, typename I, typename T>
TOKCORE_INLINE void store2(T* p, Portable<S, I> a, Portable<S, I> b) {
  constexpr int w = Portable<S, I>::kWidth;
  S entries[2 * w];
  std::memcpy(entries, &a.v, sizeof a.v);
  std::memcpy(entries + w, &b.v, sizeof b.v);
  for (int i = 0; i < 2 * w; ++i) from_acc(entries[i], p + i);
}
template <typename S, typename I, typename T>
TOKCORE_INLINE void stream2(T* p, Portable<S, I> a, Portable<S, I> b) {
  store2(p, a, b);
}

// Streaming stores bypass the cache and are ordered with nothing: before the same line is written
// again, or another thread may read it, they have to be drained.
TOKCORE_INLINE void drain_streams() {
#if defined(TOKCORE_ISA_AVX512) || defined(TOKCORE_ISA_AVX2)
  _mm_sfence();
#endif
}

// ---- exponential
// -----------------------------------------------------------------------------------------------------

// 2^x for x <= 0 or moderate: 0 from -127 down (-150 with scalef), -inf included, NaN for NaN,
// relative error <= 1.6e-7 (below -126 an error of 2^-127 instead), and exactly 1 at 0. The
// polynomial is the minimax of degree 5 on [-1/2, 1/2] with the constant fixed at 1 (error 9.2e-8).
TOKCORE_INLINE FloatVec exp2(FloatVec x) {
  const FloatVec t = max_or_nan(x, FloatVec::all(kExp2Floor));
  const FloatVec n = round_even(t);
  const FloatVec f = t - n;
  FloatVec p = FloatVec::all(0x1.5bba14p-10f);
  p = fma(p, f, FloatVec::all(0x1.3cea88p-7f));
  p = fma(p, f, FloatVec::all(0x1.c6b752p-5f));
  p = fma(p, f, FloatVec::all(0x1.ebf9bcp-3f));
  p = fma(p, f, FloatVec::all(0x1.62e42ap-1f));
  p = fma(p, f, FloatVec::all(1.0f));
  return scale2(p, n);
}
TOKCORE_INLINE DoubleVec exp2(DoubleVec x) {
  for (int i = 0; i < DoubleVec::kWidth; ++i) x.v[i] = __builtin_exp2(x.v[i]);
  return x;
}

constexpr double kLog2E = 1.44269504088896340736;

// ---- the compiler's own vectors

// a * b + c, rounded once; only where there is an instruction for it (TOKCORE_FUSED).
#if defined(TOKCORE_ISA_AVX512)
#define TOKCORE_FUSED 1
TOKCORE_INLINE __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
TOKCORE_INLINE __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(TOKCORE_ISA_AVX2)
#define TOKCORE_FUSED 1
TOKCORE_INLINE __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
TOKCORE_INLINE __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#endif

}  // namespace TOKCORE_ISA
}  // namespace tokcore
