// The device vocabulary: the only names that code under csrc/cuda uses for the machine it runs on.
// nvcc maps them to a GPU; the host compiler, with TOKCORE_EMULATED, maps them to csrc/emulation,
// which runs a block's threads as fibers and checks what a GPU would let pass. Everything lives in
// namespace tokcore (or is a CUDA built-in), so kernels do too.
//
// As in CUDA: __global__ __device__ __host__ __forceinline__ __launch_bounds__(threads[, blocks]);
// threadIdx blockIdx blockDim gridDim, and dim3.
//
// Shared memory, never a bare __shared__. It begins uninitialised in each block.
//   TOKCORE_SHARED(T, name, n);      n elements of T (n a constant), 16-byte aligned
//   dynamic_shared<T>(count, byte_offset = 0)   part of the shared_bytes given to launch
//   Shared<T>                        the type of both, to pass on; s + k advances as a pointer does
//   load16_shared(s, i)              Pack<T> of the elements from s[i] on; 16-byte aligned
//   store16_shared(s, i, pack)
// An element is read or written as a whole: `T x = s[i]; s[i] = x; s[i] += x; float(s[i])`. It has
// no address but for atomics, no fields, and cannot be held by `auto` or a reference. For a
// template that deduces its argument's type write T(s[i]).
//
// 16-byte global access; addresses are multiples of 16.
//   Pack<T>                          kSize = 16 / sizeof(T) values p[0] ... p[kSize - 1]
//   load16(p)                        by the read-only path: nobody may write *p during the kernel
//   store16(p, pack)
//   load16_streaming(p)              for what is used once: first to leave the cache. Also the load
//   store16_streaming(p, pack)       for in-place kernels, as it promises nothing about writers
//   __ldg(p)                         one element by the read-only path
//
// Synchronisation
//   __syncthreads()                  all threads of the block, at one place in the text
//   __syncwarp(mask = all lanes)     the lanes of the mask; no other warp function orders memory
//
// Warp functions. All lanes named in the mask call the same function with the same mask; lanes past
// the end of a partial warp may be named, but not read.
//   __shfl_sync(mask, x, lane, width = 32)     x: int, unsigned, 64-bit integer, float, double
//   __shfl_xor_sync __shfl_up_sync __shfl_down_sync(mask, x, delta, width = 32)
//   __ballot_sync(mask, p) -> unsigned; __any_sync __all_sync(mask, p) -> int
//   __activemask()                   lanes that happen to run together: any set with the caller
//
// Integer atomics, on global memory (T*) or shared (&s[i]); there are none on floats.
//   atomicAdd atomicAnd atomicOr atomicXor atomicExch atomicCAS   int, unsigned, unsigned long long
//   atomicMin atomicMax                                           these and long long
//
// Arithmetic: min max (unqualified), __popc __popcll __ffs __ffsll __clz __clzll, __float_as_uint
// __uint_as_float, __expf __logf __fdividef rsqrtf rsqrt exp2f log2f, and what <cmath> declares.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

namespace tokcore {

template <typename T>
using Shared = T*;

// Bytes, not T[n]: __shared__ does not allow an element type with member initialisers.
#define TOKCORE_SHARED(T, name, n)                                     \
  static_assert(alignof(T) <= 16, "shared memory is 16-byte aligned"); \
  __shared__ alignas(16) unsigned char name##_bytes[sizeof(T) * (n)];  \
  T* const name = reinterpret_cast<T*>(name##_bytes)

template <typename T>
__device__ __forceinline__ Shared<T> dynamic_shared(int64_t /* count */, int64_t byte_offset = 0) {
  extern __shared__ uint4 tokcore_dynamic_shared[];  // uint4 for its alignment
  return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(tokcore_dynamic_shared) +
                              byte_offset);
}

}  // namespace tokcore

#elif defined(TOKCORE_EMULATED)
#include "emulation/vocabulary.h"
#else
#error "csrc/cuda is compiled by nvcc, or by a host compiler with TOKCORE_EMULATED"
#endif

namespace tokcore {

template <typename T>
struct alignas(16) Pack {
  static_assert(16 % sizeof(T) == 0, "a pack is a whole number of elements");
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
  __device__ __forceinline__ T& operator[](int i) { return values[checked(i)]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[checked(i)]; }

  __device__ __forceinline__ static int checked(int i) {
#if defined(TOKCORE_EMULATED)
    emulation::check_pack_index(i, kSize);
#endif
    return i;
  }
};

#if defined(__CUDACC__)

// Through uint4, since a struct copy may be split into narrower accesses.
template <typename T>
__device__ __forceinline__ Pack<T> pack_of_bits(uint4 bits) {
  Pack<T> pack;
  memcpy(static_cast<void*>(&pack), &bits, 16);
  return pack;
}

template <typename T>
__device__ __forceinline__ uint4 bits_of_pack(const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, 16);
  return bits;
}

template <typename T>
__device__ __forceinline__ Pack<T> load16(const T* p) {
  return pack_of_bits<T>(__ldg(reinterpret_cast<const uint4*>(p)));
}

template <typename T>
__device__ __forceinline__ Pack<T> load16_streaming(const T* p) {
  return pack_of_bits<T>(__ldcs(reinterpret_cast<const uint4*>(p)));
}

template <typename T>
__device__ __forceinline__ void store16(T* p, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(p) = bits_of_pack(pack);
}

template <typename T>
__device__ __forceinline__ void store16_streaming(T* p, const Pack<T>& pack) {
  __stcs(reinterpret_cast<uint4*>(p), bits_of_pack(pack));
}

template <typename T>
__device__ __forceinline__ Pack<T> load16_shared(Shared<T> s, int64_t i) {
  return pack_of_bits<T>(*reinterpret_cast<const uint4*>(s + i));
}

template <typename T>
__device__ __forceinline__ void store16_shared(Shared<T> s, int64_t i, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(s + i) = bits_of_pack(pack);
}

#endif

}  // namespace tokcore
