#include "emulation/scheduler.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/shared_memory.h"
#include "emulation/warp.h"

namespace tokcore {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Moment present;

namespace {

constexpr unsigned kMaxThreads = 1024;

enum class State { fresh, running, at_barrier, at_collective, finished };

struct Thread {
  Fiber* fiber;
  dim3 index;
  unsigned number;
  State state;
  Site site;  // where it waits
};

// Thrown into the threads that still wait when a block has failed, so that their stacks unwind.
struct Cancelled {};

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return n <= UINT32_MAX ? ((next() >> 32) * n) >> 32 : next() % n; }
};

std::string coordinates(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string place(const Site& site) {
  return std::string(site.function) + " at " + site.file + ":" + std::to_string(site.line);
}

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

class Scheduler {
 public:
  void set_seed(uint64_t seed);
  uint64_t seed();
  void run(const Launch& launch);

  void block_barrier(const Site& site);
  uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source_lane,
                           const Site& site);
  bool ordered_within_warp(const Moment& moment) const;
  std::string thread_name(unsigned number) const {
    return "thread " + coordinates(threads_[number].index);
  }
  const Thread& current() const { return *current_; }
  std::runtime_error error(const Thread& thread, const std::string& what) const;

  static void thread_body();

 private:
  void check_limits(const Launch& launch) const;
  void prepare(const Launch& launch);
  void run_block();
  void start_block();
  void cancel_block();
  void resume(Thread& thread);
  void wait(State state, const Site& site);
  std::string describe(const Thread& thread) const;
  std::runtime_error deadlock() const;

  Warp& warp_of(const Thread& thread) { return warps_[thread.number / kWarpSize]; }

  std::mutex mutex_;
  uint64_t seed_ = 0;
  uint64_t launches_ = 0;  // since the seed was set
  Random random_{0};

  std::vector<std::unique_ptr<Fiber>> fibers_;  // kept for the life of the process
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Thread*> ready_;
  const Launch* launch_ = nullptr;
  Thread* current_ = nullptr;
  unsigned finished_ = 0;
  unsigned at_barrier_ = 0;
  const Thread* first_at_barrier_ = nullptr;
  uint64_t epoch_ = 0;
  bool cancelled_ = false;
  std::exception_ptr error_;
};

// Never destroyed: fibers stay suspended until the process ends.
Scheduler& scheduler() {
  static Scheduler& instance = *new Scheduler;
  return instance;
}

void Scheduler::set_seed(uint64_t seed) {
  std::lock_guard<std::mutex> lock(mutex_);
  seed_ = seed;
  launches_ = 0;
}

uint64_t Scheduler::seed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return seed_;
}

void Scheduler::check_limits(const Launch& launch) const {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  std::string what;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    what = "block " + coordinates(block) + ": a block has 1 to 1024 threads, at most 64 in z";
  } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    what = "grid " + coordinates(grid) + ": at most 2^31 - 1 blocks in x, 65535 in y and z";
  } else if (launch.shared_bytes > kMaxSharedBytes) {
    what = std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory: at most " +
           std::to_string(kMaxSharedBytes);
  } else {
    return;
  }
  throw std::runtime_error("emulated kernel launched by " + place(launch.site) + ": " + what);
}

void Scheduler::run(const Launch& launch) {
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  check_limits(launch);
  prepare(launch);
  // The blocks in the order of a random affine map, which needs no table however large the grid is.
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const uint64_t start = random_.below(blocks);
  uint64_t step = blocks > 1 ? 1 + random_.below(blocks - 1) : 1;
  while (std::gcd(step, blocks) != 1) ++step;
  for (uint64_t i = 0, block = start; i < blocks; ++i, block = (block + step) % blocks) {
    blockIdx = dim3(static_cast<unsigned>(block % launch.grid.x),
                    static_cast<unsigned>(block / launch.grid.x % launch.grid.y),
                    static_cast<unsigned>(block / launch.grid.x / launch.grid.y));
    run_block();
  }
}

void Scheduler::prepare(const Launch& launch) {
  launch_ = &launch;
  random_.state = Random{seed_}.next() + launches_++;
  gridDim = launch.grid;
  blockDim = launch.block;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  while (fibers_.size() < count) {
    fibers_.push_back(
        std::make_unique<Fiber>(&Scheduler::thread_body, static_cast<unsigned>(fibers_.size())));
  }
  threads_.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    threads_[i] = {};
    threads_[i].fiber = fibers_[i].get();
    threads_[i].number = i;
    threads_[i].index =
        dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  }
  warps_.clear();
  for (unsigned first = 0; first < count; first += kWarpSize) {
    warps_.emplace_back(std::min(kWarpSize, count - first));
  }
  begin_shared_memory(launch.shared_bytes);
}

void Scheduler::start_block() {
  ready_.clear();
  for (Thread& thread : threads_) {
    thread.state = State::fresh;
    ready_.push_back(&thread);
  }
  for (Warp& warp : warps_) warp.begin_block();
  finished_ = 0;
  at_barrier_ = 0;
  cancelled_ = false;
  error_ = nullptr;
  ++epoch_;
  begin_block_of_shared_memory();
}

void Scheduler::run_block() {
  start_block();
  while (!ready_.empty() && !error_) {
    std::swap(ready_[random_.below(ready_.size())], ready_.back());
    Thread& thread = *ready_.back();
    ready_.pop_back();
    resume(thread);
  }
  if (!error_ && finished_ < threads_.size()) error_ = std::make_exception_ptr(deadlock());
  if (error_) {
    cancel_block();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Scheduler::cancel_block() {
  cancelled_ = true;
  for (Thread& thread : threads_) {
    if (thread.state != State::fresh && thread.state != State::finished) resume(thread);
  }
}

void Scheduler::resume(Thread& thread) {
  current_ = &thread;
  thread.state = State::running;
  threadIdx = thread.index;
  // Neither its epoch nor its clock can change while it runs.
  present = {epoch_, thread.number, warp_of(thread).clock(thread.number % kWarpSize)};
  thread.fiber->resume();
}

void Scheduler::thread_body() {
  Scheduler& self = scheduler();
  // An exception must not leave the fiber: there is nothing below its first frame to unwind into.
  try {
    self.launch_->call(self.launch_->closure);
  } catch (const Cancelled&) {
  } catch (...) {
    if (!self.error_) self.error_ = std::current_exception();
  }
  self.current_->state = State::finished;
  ++self.finished_;
}

void Scheduler::wait(State state, const Site& site) {
  current_->state = state;
  current_->site = site;
  Fiber::suspend();
  if (cancelled_) throw Cancelled{};
}

void Scheduler::block_barrier(const Site& site) {
  if (at_barrier_ == 0) {
    first_at_barrier_ = current_;
  } else if (!same_place(first_at_barrier_->site, site)) {
    throw error(*current_, "__syncthreads in " + place(site) + " while " +
                               thread_name(first_at_barrier_->number) +
                               " waits at another one, in " + place(first_at_barrier_->site));
  }
  current_->site = site;
  if (++at_barrier_ == threads_.size()) {
    at_barrier_ = 0;
    ++epoch_;
    // The last to arrive queues like the others: who goes first is drawn again.
    for (Thread& thread : threads_) ready_.push_back(&thread);
  }
  wait(State::at_barrier, site);
}

uint64_t Scheduler::warp_collective(Collective kind, unsigned mask, uint64_t value,
                                    unsigned source_lane, const Site& site) {
  Warp& warp = warp_of(*current_);
  const unsigned lane = lane_index();
  Thread* const lanes = current_ - lane;
  current_->site = site;
  try {
    const unsigned released = warp.arrive(lane, kind, mask, value, source_lane);
    for (unsigned other = 0; other < kWarpSize; ++other) {
      if (released >> other & 1) ready_.push_back(lanes + other);
    }
  } catch (const WarpFault& fault) {
    const Thread& at_fault = lanes[fault.lane];
    throw error(at_fault, std::string(name(kind)) + " in " + place(at_fault.site) + fault.what);
  }
  wait(State::at_collective, site);
  return warp.result(lane);
}

bool Scheduler::ordered_within_warp(const Moment& moment) const {
  if (moment.thread / kWarpSize != present.thread / kWarpSize) return false;
  const Warp& warp = warps_[present.thread / kWarpSize];
  return warp.known_clock(lane_index(), moment.thread % kWarpSize) >= moment.clock;
}

std::runtime_error Scheduler::error(const Thread& thread, const std::string& what) const {
  return std::runtime_error("emulated kernel launched by " + place(launch_->site) + ", block " +
                            coordinates(blockIdx) + ", " + thread_name(thread.number) + ": " +
                            what + " (seed " + std::to_string(seed_) + ")");
}

std::string Scheduler::describe(const Thread& thread) const {
  return thread_name(thread.number) +
         (thread.state == State::finished ? " has returned" : " waits in " + place(thread.site));
}

// Nobody can go on. A warp function that waits for lanes is the nearer cause; else it is the
// barrier.
std::runtime_error Scheduler::deadlock() const {
  for (const Warp& warp : warps_) {
    if (warp.meetings().empty()) continue;
    const Warp::Meeting& meeting = warp.meetings().front();
    const unsigned absent = warp.absent(meeting);
    const Thread* const lanes = &threads_[(&warp - warps_.data()) * kWarpSize];
    const Thread& waiting = lanes[__builtin_ctz(meeting.arrived)];
    return error(waiting, std::string(name(meeting.kind)) + " in " + place(waiting.site) +
                              " with mask " + hex(meeting.mask) + " waits for ever for lanes " +
                              hex(absent) + ": " + describe(lanes[__builtin_ctz(absent)]));
  }
  const auto absent = std::find_if(threads_.begin(), threads_.end(), [](const Thread& thread) {
    return thread.state != State::at_barrier;
  });
  return error(*first_at_barrier_, "__syncthreads in " + place(first_at_barrier_->site) +
                                       " is reached by " + std::to_string(at_barrier_) + " of " +
                                       std::to_string(threads_.size()) +
                                       " threads: " + describe(*absent));
}

}  // namespace

void run(const Launch& launch) { scheduler().run(launch); }

void fail(const std::string& what) { throw scheduler().error(scheduler().current(), what); }

void fail(const std::string& what, const Site& site) { fail(what + " in " + place(site)); }

void block_barrier(const Site& site) { scheduler().block_barrier(site); }

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source_lane,
                         const Site& site) {
  return scheduler().warp_collective(kind, mask, value, source_lane, site);
}

bool ordered_within_warp(const Moment& moment) { return scheduler().ordered_within_warp(moment); }

std::string thread_name(uint32_t thread) { return scheduler().thread_name(thread); }

}  // namespace emulation
}  // namespace tokcore

// For tests, through ctypes. Setting a seed starts its sequence of launches anew, so a failing test
// repeats.
extern "C" {
__attribute__((visibility("default"))) void tokcore_emulation_set_seed(uint64_t seed) {
  tokcore::emulation::scheduler().set_seed(seed);
}
__attribute__((visibility("default"))) uint64_t tokcore_emulation_get_seed() {
  return tokcore::emulation::scheduler().seed();
}
}
