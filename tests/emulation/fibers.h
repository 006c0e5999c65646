// Stacks that a thread of the machine runs on, and switching among them: by hand on x86-64, which takes nanoseconds,
// elsewhere by ucontext.
#pragma once

#include <memory>

namespace fastres::emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  // From here on, switching to this fiber calls main, which must not return.
  void begin(void (*main)());
  // Leaves this fiber, which must be the one that runs, and goes on where `next` was left.
  void switch_to(Fiber& next);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fastres::emulation
