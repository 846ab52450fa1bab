// The handlers for platform "cpu", which run a call as tasks on XLA's own thread pool, and the
// Python module _cpu, which returns them for registration.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "bce_cpu.h"
#include "ffi_common.h"
#include "parallel_for.h"

namespace jax_bce {
namespace {

// The fastest kernel for this processor, or the one that the environment variable JAX_BCE_CPU
// names; null if there is none.
const CpuKernel* choose_kernel() {
  const char* wanted = std::getenv("JAX_BCE_CPU");
  const auto allowed = [&](const CpuKernel& kernel) {
    return !wanted || !*wanted || std::strcmp(wanted, kernel.instruction_set) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c, d;  // Clang 14 does not know "f16c"
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool v3 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v4 && allowed(kAvx512Kernel)) return &kAvx512Kernel;
  if (v3 && allowed(kBaselineKernel)) return &kBaselineKernel;
  return nullptr;
#else
  return allowed(kBaselineKernel) ? &kBaselineKernel : nullptr;
#endif
}

const CpuKernel* const kernel = choose_kernel();

// A large result is usually in memory that the allocator has just mapped, and writing it causes one
// fault per page. Huge pages reduce the faults by a factor of 512. If they are not available,
// nothing happens.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHugePage;
  if (end > begin + 4 * kHugePage)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <bool kLoss, bool kGradient, bool kTotal = false, bool kHessian = false>
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer labels,
               ffi::AnyBuffer scale, ffi::AnyBuffer smoothing, ffi::RemainingArgs more,
               ffi::RemainingRets results, int64_t modifiers, int64_t reduced_rank,
               int64_t count) try {
  Problem problem;
  problem.total = kTotal;
  problem.hessian = kHessian;
  if (ffi::Error error = describe({logits, labels, scale, smoothing}, more, results, kLoss,
                                  kGradient, modifiers, reduced_rank, count, &problem);
      error.failure())
    return error;
  if (kTotal && !problem.reduce) return invalid("total needs a reduced_rank of at least 1, got 0");
  if (kHessian && problem.reduce)
    return invalid("hess_and_grad needs a reduced_rank of 0, got " + std::to_string(reduced_rank));
  if (results.size() != size_t{kLoss} + size_t{kGradient}) return invalid("a result too many");
  for (size_t i = 0; i < results.size(); ++i)
    if (auto result = results.get<ffi::AnyBuffer>(i); result.has_value())
      prefer_huge_pages((*result)->untyped_data(), (*result)->size_bytes());
  const int64_t rows = problem.rows(), columns = problem.columns();
  if (problem.parts > 1)  // the first is the sum
    std::fill_n(static_cast<double*>(problem.loss.data) + 1, problem.parts - 1, 0.0);
  const int64_t blocks = std::max<int64_t>(1, (columns + kBlock - 1) / kBlock);
  std::vector<double> sums(problem.reduce && blocks > 1 ? rows * blocks : 0);
  // A task is one block of a long row, or several short rows with about as many elements as a
  // block.
  const int64_t rows_in_task = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, columns));
  const int64_t tasks = blocks > 1 ? rows * blocks : (rows + rows_in_task - 1) / rows_in_task;
  const CpuLoop& loop = kernel->loop(problem);
  const auto run_task = [&](int64_t task) {
    if (blocks > 1) {
      const int64_t begin = task % blocks * kBlock;
      const double sum =
          loop.block(problem, task / blocks, begin, std::min(kBlock, columns - begin));
      if (problem.reduce) sums[task] = sum;
    } else {
      const int64_t first = task * rows_in_task;
      loop.rows(problem, first, std::min(rows, first + rows_in_task));
    }
  };
  // Passing work to another thread takes as long as a few blocks.
  constexpr int64_t kSerialTasks = 2;
  if (tasks <= kSerialTasks) {
    for (int64_t task = 0; task < tasks; ++task) run_task(task);
  } else {
    parallel_for(pool, tasks, run_task);
  }
  if (blocks > 1 && problem.reduce) {
    for (int64_t row = 0; row < rows; ++row) loop.finish(problem, row, &sums[row * blocks], blocks);
  }
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return failed(error);
}

XLA_FFI_DEFINE_HANDLER(BceLoss, (run<true, false>), Signature<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(BceLossAndGrad, (run<true, true>), Signature<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(BceGrad, (run<false, true>), Signature<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(BceTotal, (run<true, false, true>), Signature<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(BceHessAndGrad, (run<true, true, false, true>),
                       Signature<ffi::ThreadPool>());

}  // namespace
}  // namespace jax_bce

PYBIND11_MODULE(_cpu, module, pybind11::mod_gil_not_used()) {
  using namespace jax_bce;
  define_module(module, {{"loss", BceLoss},
                         {"loss_and_grad", BceLossAndGrad},
                         {"grad", BceGrad},
                         {"total", BceTotal},
                         {"hess_and_grad", BceHessAndGrad}});
  module.def("refusal", &refusal);
  module.def("instruction_set", [] { return kernel ? kernel->instruction_set : ""; });
}
