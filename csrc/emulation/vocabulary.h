// The device vocabulary (listed in cuda/primitives/device.h) on top of the scheduler and the
// watched shared memory. CUDA's names are kept, reserved ones included, since kernels are compiled
// unchanged.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulation/scheduler.h"
#include "emulation/shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// The address of a static tells one declaration from another, and one template instance from
// another.
#define TOKCORE_SHARED(T, name, n)                                   \
  static_assert((n) > 0, "the size of shared memory is a constant"); \
  static char name##_key;                                            \
  const ::tokcore::Shared<T> name =                                  \
      ::tokcore::emulation::static_shared<T>(&name##_key, (n), #name, __func__)

namespace tokcore {

template <typename T>
struct Pack;

template <typename T>
using Shared = emulation::SharedView<T>;

template <typename T>
Shared<T> dynamic_shared(int64_t count, int64_t byte_offset = 0,
                         emulation::Site site = emulation::Site::here()) {
  emulation::SharedArray* array = emulation::dynamic_array();
  const int64_t end = byte_offset + count * static_cast<int64_t>(sizeof(T));
  if (byte_offset < 0 || count < 0 || end > static_cast<int64_t>(array->bytes()) ||
      byte_offset % alignof(T) != 0) {
    emulation::fail("dynamic_shared of " + std::to_string(count) + " elements of " +
                        std::to_string(sizeof(T)) + " bytes from byte " +
                        std::to_string(byte_offset) + " on, with " +
                        std::to_string(array->bytes()) + " bytes launched,",
                    site);
  }
  return {array, byte_offset, count};
}

// Synchronisation

inline void __syncthreads(emulation::Site site = emulation::Site::here()) {
  emulation::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulation::Site site = emulation::Site::here()) {
  emulation::warp_collective(emulation::Collective::sync, mask, 0, 0, site);
}

// Fibers never run together, so the smallest answer that CUDA allows is the honest one.
inline unsigned __activemask() { return 1u << emulation::lane_index(); }

// Shuffles

namespace emulation {

template <typename T>
T shuffle(unsigned mask, T value, unsigned source_lane, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8,
                "a type that CUDA's shuffles take");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_collective(Collective::shuffle, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The lanes of the caller's segment: lane 0 of it, and the one after its last.
struct Segment {
  int begin, end;
  Segment(int width, const Site& site) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
      fail(
          "a shuffle of width " + std::to_string(width) + ", which is not a power of two up to 32,",
          site);
    }
    begin = static_cast<int>(lane_index()) / width * width;
    end = begin + width;
  }
};

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              emulation::Site site = emulation::Site::here()) {
  const emulation::Segment segment(width, site);
  return emulation::shuffle(mask, value,
                            static_cast<unsigned>(segment.begin + (lane & (width - 1))), site);
}

// Past the segment a lane reads itself, as in CUDA; an xor may reach back into an earlier segment,
// as in CUDA.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int delta, int width = 32,
                  emulation::Site site = emulation::Site::here()) {
  const emulation::Segment segment(width, site);
  const int lane = static_cast<int>(emulation::lane_index()), source = (lane ^ delta) & 31;
  return emulation::shuffle(mask, value,
                            static_cast<unsigned>(source < segment.end ? source : lane), site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulation::Site site = emulation::Site::here()) {
  const emulation::Segment segment(width, site);
  const int lane = static_cast<int>(emulation::lane_index()),
            source = lane - static_cast<int>(delta & 31);
  return emulation::shuffle(mask, value,
                            static_cast<unsigned>(source >= segment.begin ? source : lane), site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulation::Site site = emulation::Site::here()) {
  const emulation::Segment segment(width, site);
  const int lane = static_cast<int>(emulation::lane_index()),
            source = lane + static_cast<int>(delta & 31);
  return emulation::shuffle(mask, value,
                            static_cast<unsigned>(source < segment.end ? source : lane), site);
}

// Votes

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Site site = emulation::Site::here()) {
  return static_cast<unsigned>(
      emulation::warp_collective(emulation::Collective::ballot, mask, predicate != 0, 0, site));
}

inline int __any_sync(unsigned mask, int predicate,
                      emulation::Site site = emulation::Site::here()) {
  return emulation::warp_collective(emulation::Collective::any, mask, predicate != 0, 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      emulation::Site site = emulation::Site::here()) {
  return emulation::warp_collective(emulation::Collective::all, mask, predicate == 0, 0, site) == 0;
}

// 16-byte access

namespace emulation {

// A pack lives in registers: past its end there is no memory that a sanitizer would watch.
inline void check_pack_index(int i, int size) {
  if (i < 0 || i >= size)
    fail("entry " + std::to_string(i) + " of a pack of " + std::to_string(size));
}

inline void check_alignment(const void* p, const char* what, const Site& site) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(p) % 16;
  if (past != 0)
    fail(std::string(what) + " " + std::to_string(past) + " bytes past a multiple of 16,", site);
}

template <typename T>
Pack<T> load(const T* p, const char* what, const Site& site) {
  check_alignment(p, what, site);
  Pack<T> pack;
  std::memcpy(static_cast<void*>(&pack), static_cast<const void*>(p), 16);
  return pack;
}

template <typename T>
void store(T* p, const Pack<T>& pack, const char* what, const Site& site) {
  check_alignment(p, what, site);
  std::memcpy(static_cast<void*>(p), static_cast<const void*>(&pack), 16);
}

template <typename T>
void check_shared_alignment(const SharedAddress<T>& address, const char* what, const Site& site) {
  const int64_t past = (address.base + address.index * static_cast<int64_t>(sizeof(T))) % 16;
  if (past != 0)
    fail(std::string(what) + " " + std::to_string(past) + " bytes past a multiple of 16,", site);
}

}  // namespace emulation

template <typename T>
Pack<T> load16(const T* p, emulation::Site site = emulation::Site::here()) {
  return emulation::load(p, "load16", site);
}

template <typename T>
Pack<T> load16_streaming(const T* p, emulation::Site site = emulation::Site::here()) {
  return emulation::load(p, "load16_streaming", site);
}

template <typename T>
void store16(T* p, const Pack<T>& pack, emulation::Site site = emulation::Site::here()) {
  emulation::store(p, pack, "store16", site);
}

template <typename T>
void store16_streaming(T* p, const Pack<T>& pack, emulation::Site site = emulation::Site::here()) {
  emulation::store(p, pack, "store16_streaming", site);
}

template <typename T>
Pack<T> load16_shared(Shared<T> s, int64_t i, emulation::Site site = emulation::Site::here()) {
  emulation::check_shared_alignment(s.address(i), "load16_shared", site);
  Pack<T> pack;
  for (int k = 0; k < Pack<T>::kSize; ++k) pack[k] = s[i + k];
  return pack;
}

template <typename T>
void store16_shared(Shared<T> s, int64_t i, const Pack<T>& pack,
                    emulation::Site site = emulation::Site::here()) {
  emulation::check_shared_alignment(s.address(i), "store16_shared", site);
  for (int k = 0; k < Pack<T>::kSize; ++k) s[i + k] = pack[k];
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

}  // namespace tokcore

#include "emulation/arithmetic.h"
#include "emulation/atomics.h"
