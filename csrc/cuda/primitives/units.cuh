// Bytes moved in units of one type, 16 at a time where the unit is a pack. Also for what the kernel
// writes: nothing goes by the read-only path.
#pragma once

#include "cuda/primitives/device.h"

namespace tokcore {
namespace {

template <typename unit_t>
__device__ __forceinline__ unit_t load_unit(const unit_t* p) {
  return *p;
}
template <typename T>
__device__ __forceinline__ Pack<T> load_unit(const Pack<T>* p) {
  return load16_streaming(reinterpret_cast<const T*>(p));
}

template <typename unit_t>
__device__ __forceinline__ void store_unit(unit_t* p, const unit_t& unit) {
  *p = unit;
}
template <typename T>
__device__ __forceinline__ void store_unit(Pack<T>* p, const Pack<T>& unit) {
  store16(reinterpret_cast<T*>(p), unit);
}

}  // namespace
}  // namespace tokcore
