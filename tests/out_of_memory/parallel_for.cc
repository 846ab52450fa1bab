// parallel_for on a pool like XLA's, where the caller's k-th allocation fails, for every k: alone,
// and with all that follow. Either nothing has been run and it throws, or everything, once.
#include "parallel_for.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "../pool.h"

namespace {

thread_local int64_t allocations_left = INT64_MAX;
thread_local bool for_good = false;

}  // namespace

void* operator new(std::size_t size) {
  const bool fails = for_good ? allocations_left <= 0 : allocations_left == 0;
  --allocations_left;
  void* const memory = fails ? nullptr : std::malloc(size);
  return memory ? memory : throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

constexpr int kThreads = 4, kTasks = 64;

// A caller that has nothing left to do sleeps until a slow helper is done, and is woken up.
bool waits_for_a_helper() {
  Pool pool(kThreads);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> runs{0}, helped{0};
  jax_bce::parallel_for(pool, kTasks, [&](int64_t) {
    const bool helps = std::this_thread::get_id() != caller;
    // Once a helper has begun, the caller takes the rest.
    if (helps) ++helped;
    while (!helped) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(helps ? 200 : 0));
    ++runs;
  });
  return runs == kTasks;
}

// Whether there was an allocation that could fail.
bool attempt(int64_t k, bool all_that_follow, int* wrong) {
  std::vector<std::atomic<int>> runs(kTasks);
  bool threw = false, failed = false;
  {
    Pool pool(kThreads);
    for_good = all_that_follow;
    allocations_left = k;
    try {
      jax_bce::parallel_for(pool, kTasks, [&runs](int64_t i) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        ++runs[i];
      });
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    failed = allocations_left < 0;
    allocations_left = INT64_MAX;
  }
  for (const std::atomic<int>& times : runs)
    if (times != !threw) {
      std::printf("allocation %lld: thrown %d, and a task ran %d times\n",
                  static_cast<long long>(k), threw, times.load());
      ++*wrong;
      break;
    }
  return failed;
}

}  // namespace

int main() {
  int attempts = 0, wrong = !waits_for_a_helper();
  for (const bool all_that_follow : {false, true})
    for (int64_t k = 0; attempt(k, all_that_follow, &wrong); ++k) ++attempts;
  std::printf("%d allocations failed, %d wrong\n", attempts, wrong);
  return wrong > 0;
}
