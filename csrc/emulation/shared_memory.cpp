#include "emulation/shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>

namespace tokcore::emulation {
namespace {

// NaN as a float of any width, -1 as an integer.
constexpr unsigned char kPoison = 0xff;

std::vector<std::unique_ptr<SharedArray>> arrays;  // of this launch; the first is the dynamic one

const char* verb(Access kind) {
  return kind == Access::read ? "reads" : kind == Access::write ? "writes" : "updates";
}

const char* past(Access kind) {
  return kind == Access::read ? "read" : kind == Access::write ? "wrote" : "updated";
}

// Of accesses that nothing orders, keeps two, of different warps if there are: whoever comes next
// and is not ordered after all of them is then not ordered after one of the two.
void remember(Moment (&last)[2]) {
  if (happened_before_now(last[0])) {
    last[0] = present;
  } else if (happened_before_now(last[1]) ||
             last[0].thread / kWarpSize == last[1].thread / kWarpSize) {
    last[1] = present;
  }
}

}  // namespace

SharedArray::SharedArray(const void* key, const char* name, const char* function, size_t bytes,
                         size_t granule)
    : key_(key),
      name_(name),
      function_(function),
      bytes_(bytes),
      granule_(granule),
      storage_(bytes / sizeof(Chunk) + 1),
      written_(bytes),
      // calloc: large arrays are mostly untouched, and their pages then cost nothing.
      cells_(static_cast<Cell*>(std::calloc(bytes / granule + 1, sizeof(Cell))), &std::free) {
  if (!cells_) throw std::bad_alloc();
  begin_block();
}

void SharedArray::begin_block() {
  std::memset(storage_.data(), kPoison, storage_.size() * sizeof(Chunk));
  std::fill(written_.begin(), written_.end(), 0);
}

std::string SharedArray::description() const {
  return std::string("shared array '") + name_ + "' of " + function_;
}

void SharedArray::check_order(const Moment& earlier, Access earlier_kind, Access kind,
                              int64_t index) const {
  if (happened_before_now(earlier)) return;
  fail("race on element " + std::to_string(index) + " of " + description() +
       ", with no barrier between: first " + thread_name(earlier.thread) + " " +
       past(earlier_kind) + " it, now this thread " + verb(kind) + " it");
}

unsigned char* SharedArray::access(int64_t base, int64_t count, int64_t index, size_t size,
                                   Access kind) {
  if (index < 0 || index >= count) {
    fail("element " + std::to_string(index) + " of " + description() +
         " is out of bounds, it has " + std::to_string(count) + ": this thread " + verb(kind) +
         " it");
  }
  const size_t offset = static_cast<size_t>(base) + static_cast<size_t>(index) * size;
  Cell& cell = cells_[offset / granule_];
  check_order(cell.write, Access::write, kind, index);
  if (kind != Access::read) {
    for (const Moment& read : cell.reads) check_order(read, Access::read, kind, index);
  }
  if (kind != Access::atomic) {
    for (const Moment& atomic : cell.atomics) check_order(atomic, Access::atomic, kind, index);
  }
  unsigned char* const written = written_.data() + offset;
  if (kind != Access::write && std::memchr(written, 0, size) != nullptr) {
    fail("element " + std::to_string(index) + " of " + description() +
         " is used uninitialised: this thread " + verb(kind) +
         " it before any thread of the block has written it (none does, or a barrier is missing)");
  }
  if (kind == Access::read) {
    remember(cell.reads);
  } else if (kind == Access::atomic) {
    remember(cell.atomics);
  } else {
    cell.write = present;
    std::memset(written, 1, size);
  }
  return reinterpret_cast<unsigned char*>(storage_.data()) + offset;
}

void begin_shared_memory(size_t dynamic_bytes) {
  arrays.clear();
  // Its cells are a byte apart, as views of any type may lie in it.
  arrays.push_back(
      std::make_unique<SharedArray>(nullptr, "dynamic_shared", "the launch", dynamic_bytes, 1));
}

void begin_block_of_shared_memory() {
  for (const auto& array : arrays) array->begin_block();
}

SharedArray* dynamic_array() { return arrays.front().get(); }

SharedArray* static_array(const void* key, size_t bytes, size_t granule, const char* name,
                          const char* function) {
  size_t total = bytes;
  for (const auto& array : arrays) {
    if (array->key() == key) return array.get();
    if (array != arrays.front()) total += array->bytes();
  }
  arrays.push_back(std::make_unique<SharedArray>(key, name, function, bytes, granule));
  const size_t dynamic_bytes = dynamic_array()->bytes();
  if (total > kMaxStaticSharedBytes || total + dynamic_bytes > kMaxSharedBytes) {
    fail("shared memory of " + std::to_string(total) + " bytes, and " +
         std::to_string(dynamic_bytes) + " dynamic ones, with " + arrays.back()->description() +
         ": at most " + std::to_string(kMaxStaticSharedBytes) + ", and " +
         std::to_string(kMaxSharedBytes) + " together");
  }
  return arrays.back().get();
}

}  // namespace tokcore::emulation
