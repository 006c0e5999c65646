#include "fibers.h"

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__) || defined(FASTRES_EMULATION_UCONTEXT)
#define FASTRES_EMULATION_BY_UCONTEXT
#include <ucontext.h>
#endif

namespace fastres::emulation {

namespace {

constexpr size_t stack_bytes = 256 * 1024;

#if !defined(FASTRES_EMULATION_BY_UCONTEXT)
// Pushes what a function must preserve, leaves the stack pointer in *save and goes on with the stack `to`.
__attribute__((naked, noinline)) void switch_stacks(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

}  // namespace

struct Fiber::State {
  unsigned char* stack = nullptr;  // none for the fiber that never begins, the caller's own stack
#if defined(FASTRES_EMULATION_BY_UCONTEXT)
  ucontext_t context;
#else
  void* pointer = nullptr;
#endif
};

Fiber::Fiber() : state_(std::make_unique<State>()) {}

Fiber::~Fiber() {
  if (state_->stack) munmap(state_->stack, stack_bytes);
}

void Fiber::begin(void (*main)()) {
  if (!state_->stack) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    state_->stack = static_cast<unsigned char*>(memory);
  }
#if defined(FASTRES_EMULATION_BY_UCONTEXT)
  getcontext(&state_->context);
  state_->context.uc_stack.ss_sp = state_->stack;
  state_->context.uc_stack.ss_size = stack_bytes;
  state_->context.uc_link = nullptr;
  makecontext(&state_->context, main, 0);
#else
  // As switch_stacks leaves a stack: six registers, and where to return to. The null above is main's own return
  // address, and aligns the stack as a call does.
  void** top = reinterpret_cast<void**>(state_->stack + stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  state_->pointer = top;
#endif
}

void Fiber::switch_to(Fiber& next) {
#if defined(FASTRES_EMULATION_BY_UCONTEXT)
  swapcontext(&state_->context, &next.state_->context);
#else
  switch_stacks(&state_->pointer, next.state_->pointer);
#endif
}

}  // namespace fastres::emulation
