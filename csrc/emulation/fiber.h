// A stack of its own for each thread of a block. The scheduler resumes a fiber; the fiber suspends
// itself; nothing else ever switches. A fiber runs `body` once per life and is used again for the
// next block, so a stack is mapped only once.
#pragma once

#include <cstddef>

#if defined(TOKCORE_EMULATION_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#define TOKCORE_FIBER_UCONTEXT 1  // thirty times slower to switch, but everywhere
#include <ucontext.h>
#endif

namespace tokcore::emulation {

class Fiber {
 public:
#if defined(TOKCORE_FIBER_UCONTEXT)
  using Context = ucontext_t;
#else
  using Context = void*;  // the stack pointer; the callee-saved registers lie on the stack
#endif

  // `index` only staggers the stacks. `body` must not throw.
  Fiber(void (*body)(), unsigned index);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();          // runs until the fiber suspends itself or `body` returns
  static void suspend();  // back into resume(); called on a fiber

 private:
  static void main();

  void (*body_)();
  void* stack_;
  Context context_;
  void* fake_stack_ = nullptr;  // AddressSanitizer's own record of this stack
};

}  // namespace tokcore::emulation
