// The library of the emulation's own test: runs the kernels of kernels.h by name.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include "emulation/launch.h"
#include "emulation/selftest/kernels.h"

namespace tokcore {
namespace {

struct Shape {
  dim3 block = kThreads;
  dim3 grid = 3;
  size_t shared_bytes = 0;
};

struct Case {
  const char* name;
  void (*broken)(Params);
  void (*mended)(Params);
  float (*expected)(int thread);  // of a mended kernel, by the thread's number in its block
  Shape shape = {};
  Shape broken_shape = shape;
};

float same(int t) { return static_cast<float>(t); }
float first_half_reversed(int t) { return same(t % 32 < 16 ? t ^ 15 : t); }

// What CUDA's guide says of segments of eight lanes.
float segment_sum(int t) {
  const int begin = t / 8 * 8;
  const double up = t - 3 >= begin ? t - 3 : t, down = t + 3 < begin + 8 ? t + 3 : t;
  const double crossed = (t ^ 9) < begin + 8 ? t ^ 9 : t;  // an earlier segment may be read
  return static_cast<float>((begin + 3 + 100 * up + 10000 * down + 1000000 * crossed) / 8);
}

// Every bit cleared, every bit set, an even number of every t % 32 and the xor of 0 ... 95.
float atomic_sum(int) { return 0 + 1 + 0 - 1 + 0 + 5 + (kThreads - 1 + 5) + 70 + 90; }

constexpr size_t kTwoTiles = 2 * kThreads * sizeof(float);

#define CASE(name) #name, name<true>, name<false>
const Case kCases[] = {
    {CASE(missing_barrier), [](int t) { return same(kThreads - 1 - t); }},
    {CASE(missing_second_barrier), [](int t) { return 3 * same((t + 32) % kThreads); }},
    {CASE(unsynchronised_sum), [](int) { return same(kThreads); }},
    {CASE(atomic_kinds), atomic_sum},
    {CASE(atomic_beside_read), [](int t) { return same(t == 40 ? kThreads - 1 : 0); }},
    {CASE(out_of_bounds_read), [](int t) { return same((t + 1) % kThreads); }},
    {CASE(out_of_bounds_dynamic), same, {kThreads, 3, kTwoTiles}},
    {CASE(dynamic_beyond_launch), same, {kThreads, 3, kTwoTiles}},
    {CASE(too_much_shared), same},
    {"too_many_threads", innocent, innocent, same, {}, {1056}},
    {"too_many_blocks", innocent, innocent, same, {}, {32, {1, 65536}}},
    {"too_many_shared_bytes", innocent, innocent, same, {}, {32, 1, 163 * 1024 + 1}},
    {CASE(divergent_barrier), same},
    {CASE(skipped_barrier), same},
    {CASE(early_return), same},
    {CASE(shuffle_outside_mask), first_half_reversed},
    {CASE(shuffle_absent_lanes), first_half_reversed},
    {CASE(shuffle_partial_warp), [](int t) { return same(t ^ 15); }, {80}},
    {CASE(shuffle_segments), segment_sum},
    {CASE(vote_without_caller), [](int t) { return same(t % 32 < 16 ? 0xaaaa : 0); }},
    {CASE(mixed_collectives), [](int) { return 1.0f; }},
    {CASE(misaligned_load), [](int) { return 4.0f + 7.0f; }},
    {CASE(misaligned_shared_store), same},
    {CASE(pack_index), [](int) { return 1.0f; }},
    {CASE(uninitialised_shared), [](int) { return 0.0f + 1.0f + 2.0f; }},
    {CASE(left_by_another_block), same},
    {CASE(missing_syncwarp), [](int t) { return same(t ^ 1); }},
    {CASE(syncwarp_across_warps), [](int t) { return same(t ^ 31); }},
    {CASE(syncwarp_of_half), [](int t) { return same(t ^ 15); }},
    {CASE(block_sum), [](int) { return 2.0f * 1023 * 1024 / 2; }, {{32, 8, 4}, {2, 1, 2}}},
};
#undef CASE

size_t count(const dim3& size) { return size_t{size.x} * size.y * size.z; }

std::vector<float> run(const Shape& shape, void (*kernel)(Params)) {
  std::vector<float> in(kValues), out(count(shape.grid) * count(shape.block), NAN);
  std::iota(in.begin(), in.end(), 0.0f);
  launch(shape.grid, shape.block, shape.shared_bytes, Stream{}, kernel,
         Params{in.data(), out.data()});
  return out;
}

// An empty string if every thread of every block wrote what it should.
std::string run_case(const Case& c, bool mended) {
  const Shape& shape = mended ? c.shape : c.broken_shape;
  const std::vector<float> out = run(shape, mended ? c.mended : c.broken);
  for (size_t i = 0; i < out.size(); ++i) {
    const float expected = c.expected(static_cast<int>(i % count(shape.block)));
    if (!(out[i] == expected)) {
      return "thread " + std::to_string(i) + " gave " + std::to_string(out[i]) + ", not " +
             std::to_string(expected);
    }
  }
  return "";
}

}  // namespace
}  // namespace tokcore

extern "C" {

#define EXPORT __attribute__((visibility("default")))

void tokcore_emulation_set_seed(uint64_t seed);

EXPORT int tokcore_selftest_count() { return sizeof tokcore::kCases / sizeof tokcore::kCases[0]; }
EXPORT const char* tokcore_selftest_name(int i) { return tokcore::kCases[i].name; }

// 0: passed; 1: the emulation reported `message`; 2: it did not, and the result is wrong; 3: no
// such case.
EXPORT int tokcore_selftest_run(const char* name, int mended, uint64_t seed, char* message,
                                size_t size) {
  for (const tokcore::Case& c : tokcore::kCases) {
    if (std::strcmp(c.name, name) != 0) continue;
    tokcore_emulation_set_seed(seed);
    try {
      const std::string wrong = tokcore::run_case(c, mended != 0);
      std::snprintf(message, size, "%s", wrong.c_str());
      return wrong.empty() ? 0 : 2;
    } catch (const std::exception& e) {
      std::snprintf(message, size, "%s", e.what());
      return 1;
    }
  }
  return 3;
}

// Under AddressSanitizer this ends the process.
EXPORT void tokcore_selftest_read_past_end() { tokcore::run({32, 1}, tokcore::read_past_end); }

}  // extern "C"
