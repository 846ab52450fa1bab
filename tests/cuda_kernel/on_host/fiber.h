// Fibers: stacks that one thread of the host runs in turn, cheap enough for the threads of several
// thread blocks. ThreadSanitizer takes each for a thread, ordered only by `release` and `acquire`.
#pragma once

#include <stddef.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

// For what lets fibers run, which is no part of the program that they run.
#define UNSEEN __attribute__((noinline, no_sanitize("thread")))

// Whoever has acquired what another has released comes after that.
inline void release([[maybe_unused]] void* what) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(what);
#endif
}
inline void acquire([[maybe_unused]] void* what) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(what);
#endif
}

// Puts what a call has to keep on this stack, and takes it from another.
__attribute__((naked, noipa)) UNSEEN inline void switch_stack(void** /* from */, void* /* to */) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

class Fiber {
 public:
  // The caller itself is one, on its own stack.
  Fiber() = default;

  // Another will run `body`, which does not return.
  UNSEEN void prepare(void (*body)()) {
    bottom_ = stack_;
    void** top = reinterpret_cast<void**>(stack_ + kBytes) - 2;
    *top = reinterpret_cast<void*>(body);
    top_ = top - 6;
#ifdef __SANITIZE_THREAD__
    thread_ = __tsan_create_fiber(0);
#endif
  }

  // Runs the other until that one switches back.
  UNSEEN void switch_to(Fiber* other) {
#if defined(__SANITIZE_THREAD__)
    if (!thread_) thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(other->thread_, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, other->bottom_, other->bytes_);
#endif
    switch_stack(&top_, other->top_);
    arrived(other);
  }

  // The other has switched to this one, which was prepared and begins.
  void arrived([[maybe_unused]] Fiber* other) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &other->bottom_, &other->bytes_);
#endif
  }

 private:
  static constexpr size_t kBytes = 128 << 10;

  void* top_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = kBytes;
  void* thread_ = nullptr;  // ThreadSanitizer's
  alignas(16) char stack_[kBytes];
};

}  // namespace cuda_on_host
