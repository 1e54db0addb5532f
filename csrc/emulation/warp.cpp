#include "emulation/warp.h"

#include <algorithm>
#include <cstdio>

namespace tokcore::emulation {
namespace {

bool has(unsigned mask, unsigned lane) { return mask >> lane & 1; }

}  // namespace

const char* name(Collective kind) {
  switch (kind) {
    case Collective::sync:
      return "__syncwarp";
    case Collective::shuffle:
      return "a shuffle";
    case Collective::ballot:
      return "__ballot_sync";
    case Collective::any:
      return "__any_sync";
    case Collective::all:
      return "__all_sync";
  }
  return "";
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

Warp::Warp(unsigned lanes) : existing_(lanes >= kWarpSize ? 0xffffffffu : (1u << lanes) - 1) {
  // A lane's own clock starts above what the others know of it.
  for (unsigned a = 0; a < kWarpSize; ++a) clocks_[a][a] = 1;
}

void Warp::begin_block() { meetings_.clear(); }

unsigned Warp::arrive(unsigned lane, Collective kind, unsigned mask, uint64_t value,
                      unsigned source) {
  if (!has(mask, lane)) {
    throw WarpFault{lane, " with mask " + hex(mask) + ", which does not name the calling lane " +
                              std::to_string(lane)};
  }
  lanes_[lane].value = value;
  lanes_[lane].source = source;
  auto meeting = std::find_if(meetings_.begin(), meetings_.end(),
                              [&](const Meeting& m) { return m.mask == mask; });
  if (meeting == meetings_.end()) {
    meeting = meetings_.insert(meeting, Meeting{mask, 0, kind});
  } else if (meeting->kind != kind) {
    throw WarpFault{
        lane, " with mask " + hex(mask) + " while lanes of it wait at " + name(meeting->kind)};
  }
  meeting->arrived |= 1u << lane;
  // Lanes past the end of a partial warp never come, and CUDA does not wait for them either.
  if (absent(*meeting) != 0) return 0;
  const Meeting complete = *meeting;
  meetings_.erase(meeting);
  // Results are given out now, as the first lane to go on may bring its next value before the
  // others have looked.
  if (kind == Collective::shuffle) {
    exchange(complete);
  } else if (kind == Collective::sync) {
    synchronise(complete);
  } else {
    vote(complete);
  }
  return complete.arrived;
}

void Warp::exchange(const Meeting& meeting) {
  for (unsigned a = 0; a < kWarpSize; ++a) {
    if (!has(meeting.arrived, a)) continue;
    const unsigned source = lanes_[a].source;
    if (!has(meeting.arrived, source)) {
      const bool exists = has(existing_, source);
      throw WarpFault{a, " reads lane " + std::to_string(source) + ", which is outside the " +
                             (exists ? "mask " + hex(meeting.mask) : "block")};
    }
    lanes_[a].result = lanes_[source].value;
  }
}

void Warp::vote(const Meeting& meeting) {
  uint64_t votes = 0;
  for (unsigned a = 0; a < kWarpSize; ++a) {
    if (has(meeting.arrived, a) && lanes_[a].value != 0) votes |= uint64_t(1) << a;
  }
  for (unsigned a = 0; a < kWarpSize; ++a) {
    if (has(meeting.arrived, a)) lanes_[a].result = votes;
  }
}

void Warp::synchronise(const Meeting& meeting) {
  std::array<uint32_t, kWarpSize> joined{};
  for (unsigned a = 0; a < kWarpSize; ++a) {
    if (!has(meeting.arrived, a)) continue;
    for (unsigned b = 0; b < kWarpSize; ++b) joined[b] = std::max(joined[b], clocks_[a][b]);
  }
  for (unsigned a = 0; a < kWarpSize; ++a) {
    if (!has(meeting.arrived, a)) continue;
    clocks_[a] = joined;
    ++clocks_[a][a];
  }
}

}  // namespace tokcore::emulation
