// Shared memory that watches its readers and writers. A kernel sees views; an element of a view is
// a proxy, through which every read, write and atomic passes. Each is checked against the bounds, a
// read against what was written in this block, and all against the earlier accesses of other
// threads that no barrier or __syncwarp orders before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulation/scheduler.h"

namespace tokcore::emulation {

// A block's memory on sm_80, the smallest of the devices we build for that has a choice: so much
// for declared arrays, so much with the dynamic part.
constexpr size_t kMaxStaticSharedBytes = 48 * 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;

enum class Access { read, write, atomic };

// One declaration of shared memory, or all of the dynamic kind.
class SharedArray {
 public:
  // Accesses are compared where elements begin, every `granule` bytes.
  SharedArray(const void* key, const char* name, const char* function, size_t bytes,
              size_t granule);

  // The bytes of element `index` of a view that begins `base` bytes in and has `count` elements of
  // `size` bytes.
  unsigned char* access(int64_t base, int64_t count, int64_t index, size_t size, Access kind);

  void begin_block();  // poisons
  const void* key() const { return key_; }
  size_t bytes() const { return bytes_; }
  std::string description() const;

 private:
  // The last access of each kind; of reads and of atomics, which may come together, two.
  struct Cell {
    Moment write;
    Moment reads[2];
    Moment atomics[2];
  };
  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };

  void check_order(const Moment& earlier, Access earlier_kind, Access kind, int64_t index) const;

  const void* key_;
  const char* name_;
  const char* function_;
  size_t bytes_;
  size_t granule_;
  std::vector<Chunk> storage_;
  std::vector<unsigned char> written_;  // per byte: since the block began
  std::unique_ptr<Cell[], void (*)(void*)> cells_;
};

void begin_shared_memory(size_t dynamic_bytes);
void begin_block_of_shared_memory();
SharedArray* static_array(const void* key, size_t bytes, size_t granule, const char* name,
                          const char* function);
SharedArray* dynamic_array();

// &s[i], for atomics.
template <typename T>
struct SharedAddress {
  SharedArray* array;
  int64_t base, count, index;
};

template <typename T>
class SharedElement {
 public:
  explicit SharedElement(const SharedAddress<T>& address) : address_(address) {}
  SharedElement(const SharedElement&) = delete;

  // Only while it is a temporary: after `auto x = s[i]` every use of x would read again, and does
  // not compile.
  operator T() && {
    T value;
    std::memcpy(static_cast<void*>(&value), at(Access::read), sizeof(T));
    return value;
  }
  template <typename U,
            typename = std::enable_if_t<std::is_arithmetic_v<U> && !std::is_same_v<U, T>>>
  explicit operator U() && {
    return static_cast<U>(std::move(*this).operator T());
  }
  void operator=(const T& value) && {
    std::memcpy(at(Access::write), static_cast<const void*>(&value), sizeof(T));
  }
  void operator=(SharedElement&& other) && { std::move(*this) = std::move(other).operator T(); }
  template <typename U>
  void operator+=(const U& other) && {
    std::move(*this) = static_cast<T>(read() + other);
  }
  template <typename U>
  void operator-=(const U& other) && {
    std::move(*this) = static_cast<T>(read() - other);
  }
  template <typename U>
  void operator*=(const U& other) && {
    std::move(*this) = static_cast<T>(read() * other);
  }
  SharedAddress<T> operator&() && { return address_; }

 private:
  unsigned char* at(Access kind) const {
    return address_.array->access(address_.base, address_.count, address_.index, sizeof(T), kind);
  }
  T read() { return std::move(*this).operator T(); }

  SharedAddress<T> address_;
};

// Used like a pointer to the first element; it knows where the array ends.
template <typename T>
class SharedView {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16,
                "shared memory holds plain values");

 public:
  SharedView(SharedArray* array, int64_t base, int64_t count, int64_t first = 0)
      : array_(array), base_(base), count_(count), first_(first) {}

  SharedElement<T> operator[](int64_t i) const { return SharedElement<T>(address(i)); }
  SharedView operator+(int64_t k) const { return {array_, base_, count_, first_ + k}; }
  SharedAddress<T> address(int64_t i) const { return {array_, base_, count_, first_ + i}; }

 private:
  SharedArray* array_;
  int64_t base_, count_, first_;
};

template <typename T>
SharedView<T> static_shared(const void* key, int64_t count, const char* name,
                            const char* function) {
  return {static_array(key, static_cast<size_t>(count) * sizeof(T), sizeof(T), name, function), 0,
          count};
}

}  // namespace tokcore::emulation
