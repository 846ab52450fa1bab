// A loop over tasks on a thread pool: XLA's, or another one with the same two functions.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace jax_bce {

// Runs f(0), ..., f(count - 1) on the pool and the calling thread; f must not throw. The caller
// takes part and never waits for a helper that has not started, so a pool whose threads are all
// such callers cannot deadlock. A helper that starts late finds no work and accesses only the
// shared state. Throws only if there is no memory for that state, before any work starts.
template <class Pool, class F>
void parallel_for(Pool& pool, int64_t count, const F& f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto state = std::make_shared<State>();
  const F* body = &f;
  const auto work = [state, count, body] {
    int64_t mine = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++mine) (*body)(i);
    if (mine == 0 || (state->done += mine) < count) return;
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->all_done.notify_all();
  };
  try {
    const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  } catch (...) {
    // No memory for another helper. Do not rethrow: the existing helpers use this stack frame.
  }
  work();
  // A helper that is still working finishes within one block: sooner than this thread would wake
  // up.
  for (int i = 0; i < 1000 && state->done < count; ++i) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
}

}  // namespace jax_bce
