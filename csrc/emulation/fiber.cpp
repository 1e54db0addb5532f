// Switching stacks: a few instructions of assembly where we have them (a round trip of some 20 ns),
// ucontext elsewhere (it makes a system call a switch). AddressSanitizer is told of every switch;
// without that it takes a fiber's stack for an overflow of the one it knows.
#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define TOKCORE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TOKCORE_ASAN 1
#endif
#endif
#if defined(TOKCORE_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace tokcore::emulation {
namespace {

// Address space, not memory: only touched pages are backed. Large, as an overrun hits the guard
// page and ends the process.
constexpr size_t kStackBytes = 256 * 1024;

void* map_stack() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  return stack;
}

// One set of these is enough: launches run one at a time.
Fiber::Context scheduler_context;
Fiber* running = nullptr;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

#if defined(TOKCORE_ASAN)
void start_switch(void** save, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(save, bottom, size);
}
void finish_switch(void* saved, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(saved, bottom, size);
}
#else
void start_switch(void**, const void*, size_t) {}
void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace
}  // namespace tokcore::emulation

#if !defined(TOKCORE_FIBER_UCONTEXT)

// Saves the callee-saved registers on this stack and its pointer in *from, then continues where
// `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void tokcore_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl tokcore_switch_stack
  .hidden tokcore_switch_stack
  .type tokcore_switch_stack, @function
tokcore_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size tokcore_switch_stack, .-tokcore_switch_stack
)");
// A first frame: six registers, the function that `ret` goes to, and a null return address for that
// function, which ends back-traces and aligns the stack as a call does.
constexpr size_t kFrameWords = 8;
constexpr size_t kReturnWord = 6;
#else
asm(R"(
  .text
  .p2align 4
  .globl tokcore_switch_stack
  .hidden tokcore_switch_stack
  .type tokcore_switch_stack, %function
tokcore_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size tokcore_switch_stack, .-tokcore_switch_stack
)");
constexpr size_t kFrameWords = 20;
constexpr size_t kReturnWord = 11;  // x30
#endif

namespace tokcore::emulation {
namespace {

void switch_context(Fiber::Context& from, Fiber::Context& to) { tokcore_switch_stack(&from, to); }

void make_context(Fiber::Context& context, void*, void* top, void (*entry)()) {
  void** frame = static_cast<void**>(top) -
                 kFrameWords;  // the page is fresh: all other registers start as zero
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  context = frame;
}

}  // namespace
}  // namespace tokcore::emulation

#else

namespace tokcore::emulation {
namespace {

void switch_context(Fiber::Context& from, Fiber::Context& to) { swapcontext(&from, &to); }

// Not inlined: getcontext may return twice as far as the compiler knows, which would bar the
// caller's registers.
[[gnu::noinline]] void make_context(Fiber::Context& context, void* stack, void* top,
                                    void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size =
      static_cast<size_t>(static_cast<char*>(top) - static_cast<char*>(stack));
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace
}  // namespace tokcore::emulation

#endif

namespace tokcore::emulation {

Fiber::Fiber(void (*body)(), unsigned index) : body_(body), stack_(map_stack()) {
  // Tops at one distance from a page boundary would all compete for the same few cache sets.
  const size_t stagger = (index * 320) % 4096;
  make_context(context_, stack_, static_cast<char*>(stack_) + kStackBytes - stagger, &Fiber::main);
}

void Fiber::main() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    running->body_();
    suspend();
  }
}

void Fiber::resume() {
  running = this;
  start_switch(&scheduler_fake_stack, stack_, kStackBytes);
  switch_context(scheduler_context, context_);
  finish_switch(scheduler_fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  Fiber* self = running;
  start_switch(&self->fake_stack_, scheduler_stack, scheduler_stack_bytes);
  switch_context(self->context_, scheduler_context);
  finish_switch(self->fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
}

}  // namespace tokcore::emulation
