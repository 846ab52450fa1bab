// The CUDA source in the place of the CPU kernel: its handlers for platform "cpu", run on the host
// (cuda_kernel/on_host/), which has one GPU's worth of globals: one call after the other.
#include <cuda_runtime.h>
#include <fenv.h>

#include <mutex>

#include "../../../csrc/bce_cuda.h"
#include "../../../csrc/ffi_common.h"

namespace jax_bce {
namespace {

template <bool kLoss, bool kGradient, bool kTotal = false>
ffi::Error run(ffi::ThreadPool, ffi::AnyBuffer logits, ffi::AnyBuffer labels, ffi::AnyBuffer scale,
               ffi::AnyBuffer smoothing, ffi::RemainingArgs more, ffi::RemainingRets results,
               int64_t modifiers, int64_t reduced_rank, int64_t count) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Problem problem;
  if (ffi::Error error = describe({logits, labels, scale, smoothing}, more, results, kLoss,
                                  kGradient, modifiers, reduced_rank, count, &problem);
      error.failure())
    return error;
  problem.total = kTotal;
  fenv_t mode;  // XLA's threads flush subnormal numbers to zero, and a GPU does not
  fegetenv(&mode);
  fesetenv(FE_DFL_ENV);
  std::vector<double> workspace(cuda_workspace(problem.rows(), problem.columns()));
  if (problem.parts > 1 && problem.parts < static_cast<int64_t>(workspace.size()))
    return invalid("room for " + std::to_string(workspace.size()) + " float64 sums is missing");
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  const char* error = bce_cuda(problem, workspace.data(), stream);
  cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  fesetenv(&mode);
  return error ? ffi::Error::Internal(error) : ffi::Error::Success();
}

}  // namespace
}  // namespace jax_bce

#define BCE_HANDLER(name, ...)                                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (jax_bce::run<__VA_ARGS__>), \
                                jax_bce::Signature<jax_bce::ffi::ThreadPool>())
BCE_HANDLER(jax_bce_v3_loss, true, false);
BCE_HANDLER(jax_bce_v3_loss_and_grad, true, true);
BCE_HANDLER(jax_bce_v3_grad, false, true);
BCE_HANDLER(jax_bce_v3_total, true, false, true);
