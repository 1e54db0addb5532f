// The 32 lanes of a warp: who waits for whom in a warp function, what they exchange, and which of
// their accesses to shared memory a __syncwarp has ordered.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace tokcore::emulation {

constexpr unsigned kWarpSize = 32;

enum class Collective { sync, shuffle, ballot, any, all };

const char* name(Collective kind);
std::string hex(unsigned mask);

// What a lane did wrong; follows the name of the function in the report.
struct WarpFault {
  unsigned lane;
  std::string what;
};

class Warp {
 public:
  explicit Warp(unsigned lanes);  // fewer than 32 in the last warp of a block

  void begin_block();

  // A lane comes to a warp function with a value and, for a shuffle, the lane whose value it wants.
  // Returns the mask of the lanes that can go on, which is 0 until the last one has come.
  unsigned arrive(unsigned lane, Collective kind, unsigned mask, uint64_t value, unsigned source);
  // A shuffle: the value of the source. A vote: the lanes with a value other than 0.
  uint64_t result(unsigned lane) const { return lanes_[lane].result; }

  // Lanes on their way to the same call. Several calls may be under way, for disjoint masks.
  struct Meeting {
    unsigned mask;
    unsigned arrived;
    Collective kind;
  };
  const std::vector<Meeting>& meetings() const { return meetings_; }
  unsigned absent(const Meeting& meeting) const {
    return meeting.mask & existing_ & ~meeting.arrived;
  }

  // A lane's own clock counts its __syncwarps. `known_clock(a, b)`: accesses of lane b up to that
  // clock are ordered before what lane a does next. Shuffles and votes order nothing, as in CUDA.
  uint32_t clock(unsigned lane) const { return clocks_[lane][lane]; }
  uint32_t known_clock(unsigned lane, unsigned other) const { return clocks_[lane][other]; }

 private:
  struct Lane {
    uint64_t value, result;
    unsigned source;
  };

  void exchange(const Meeting& meeting);
  void vote(const Meeting& meeting);
  void synchronise(const Meeting& meeting);

  unsigned existing_;
  std::vector<Meeting> meetings_;
  std::array<Lane, kWarpSize> lanes_{};
  std::array<std::array<uint32_t, kWarpSize>, kWarpSize> clocks_{};
};

}  // namespace tokcore::emulation
