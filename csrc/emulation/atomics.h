// Integer atomics on global memory (T*) and on shared memory (&s[i]). Fibers do not interrupt each
// other, so a plain read and write is atomic; what the shared kind adds is the record of the
// access.
#pragma once

#include <algorithm>
#include <type_traits>

#include "emulation/shared_memory.h"

namespace tokcore {
namespace emulation {

template <typename Pointer>
struct PointeeOf;
template <typename T>
struct PointeeOf<T*> {
  using type = T;
};
template <typename T>
struct PointeeOf<SharedAddress<T>> {
  using type = T;
};
template <typename Pointer>
using Pointee = typename PointeeOf<Pointer>::type;

template <typename T>
T* target(T* p) {
  return p;
}

template <typename T>
T* target(const SharedAddress<T>& a) {
  return reinterpret_cast<T*>(a.array->access(a.base, a.count, a.index, sizeof(T), Access::atomic));
}

template <typename T, typename... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

// The types nvcc accepts; int64_t is not among them, it has to be an unsigned long long (long long
// for min and max).
template <typename T>
constexpr bool has_atomics = is_one_of<T, int, unsigned, unsigned long long>;
template <typename T>
constexpr bool has_ordered_atomics = has_atomics<T> || is_one_of<T, long long>;

template <typename Pointer, typename Update>
Pointee<Pointer> update(const Pointer& p, Update next) {
  auto* const value = target(p);
  const Pointee<Pointer> old = *value;
  *value = next(old);
  return old;
}

}  // namespace emulation

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicAdd(Pointer p, std::enable_if_t<emulation::has_atomics<T>, T> x) {
  // Unsigned: overflow wraps on a GPU, and is undefined here.
  using U = std::make_unsigned_t<T>;
  return emulation::update(
      p, [x](T old) { return static_cast<T>(static_cast<U>(old) + static_cast<U>(x)); });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicAnd(Pointer p, std::enable_if_t<emulation::has_atomics<T>, T> x) {
  return emulation::update(p, [x](T old) { return old & x; });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicOr(Pointer p, std::enable_if_t<emulation::has_atomics<T>, T> x) {
  return emulation::update(p, [x](T old) { return old | x; });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicXor(Pointer p, std::enable_if_t<emulation::has_atomics<T>, T> x) {
  return emulation::update(p, [x](T old) { return old ^ x; });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicExch(Pointer p, std::enable_if_t<emulation::has_atomics<T>, T> x) {
  return emulation::update(p, [x](T) { return x; });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicCAS(Pointer p, std::enable_if_t<emulation::has_atomics<T>, T> expected, T x) {
  return emulation::update(p, [expected, x](T old) { return old == expected ? x : old; });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicMin(Pointer p, std::enable_if_t<emulation::has_ordered_atomics<T>, T> x) {
  return emulation::update(p, [x](T old) { return std::min(old, x); });
}

template <typename Pointer, typename T = emulation::Pointee<Pointer>>
T atomicMax(Pointer p, std::enable_if_t<emulation::has_ordered_atomics<T>, T> x) {
  return emulation::update(p, [x](T old) { return std::max(old, x); });
}

}  // namespace tokcore
