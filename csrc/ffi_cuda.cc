// The handlers for platform "CUDA", which launch a call's kernels on XLA's stream, and the Python
// module _cuda, which returns them for registration. Compiled by the host compiler; nvcc sees
// neither XLA nor Python.
//
// A handler enqueues and returns. It does not allocate or wait, so that XLA may capture it into a
// CUDA graph.
#include <exception>

#include "bce_cuda.h"
#include "ffi_common.h"
#include "known_answer.h"

namespace jax_bce {
namespace {

template <bool kLoss, bool kGradient, bool kTotal = false>
ffi::Error run(CUstream_st* stream, ffi::AnyBuffer logits, ffi::AnyBuffer labels,
               ffi::AnyBuffer scale, ffi::AnyBuffer smoothing, ffi::RemainingArgs more,
               ffi::RemainingRets results, int64_t modifiers, int64_t reduced_rank,
               int64_t count) try {
  Problem problem;
  if (ffi::Error error = describe({logits, labels, scale, smoothing}, more, results, kLoss,
                                  kGradient, modifiers, reduced_rank, count, &problem);
      error.failure())
    return error;
  problem.total = kTotal;
  if (kTotal && !problem.reduce) return invalid("total needs a reduced_rank of at least 1, got 0");
  constexpr size_t kResults = size_t{kLoss} + size_t{kGradient};
  // The sums of groups are parts of the loss, or in a workspace, which may be larger than needed if
  // the sizes were unknown when the program was compiled.
  const bool in_parts = problem.parts > 1;
  const int64_t needed = problem.reduce ? cuda_workspace(problem.rows(), problem.columns()) : 0;
  double* workspace = nullptr;
  int64_t room = in_parts ? problem.parts : 0;
  if (results.size() > kResults) {
    auto sums = results.get<ffi::AnyBuffer>(kResults);
    if (results.size() > kResults + 1 || in_parts || !sums.has_value() ||
        (*sums)->element_type() != ffi::DataType::F64)
      return invalid("a result too many");
    workspace = static_cast<double*>((*sums)->untyped_data());
    room = (*sums)->element_count();
  }
  if (room < needed)
    return invalid("room for " + std::to_string(needed) + " float64 sums is missing");
  const char* error = bce_cuda(problem, workspace, stream);
  return error ? ffi::Error::Internal(std::string("jax_bce: CUDA says: ") + error)
               : ffi::Error::Success();
} catch (const std::exception& error) {
  return failed(error);
}

// Before a program runs on a device, the kernels' known-answer test has passed there. Where it was
// lowered on that device, it has passed already.
ffi::Error initialize(int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) try {
  const std::string failure = known_answer(device);
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error::Internal("jax_bce: the CUDA kernel fails its known-answer test on GPU " +
                              std::to_string(device) + ": " + failure +
                              ". Set JAX_BCE_GPU=xla, on every host");
} catch (const std::exception& error) {
  return failed(error);
}
XLA_FFI_DEFINE_HANDLER(Initialize, initialize,
                       ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

using Stream = ffi::PlatformStream<CUstream_st*>;

XLA_FFI_DEFINE_HANDLER(BceLoss, (run<true, false>), Signature<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(BceLossAndGrad, (run<true, true>), Signature<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(BceGrad, (run<false, true>), Signature<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(BceTotal, (run<true, false, true>), Signature<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace
}  // namespace jax_bce

PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
  using namespace jax_bce;
  define_module(module,
                {{"loss", BceLoss},
                 {"loss_and_grad", BceLossAndGrad},
                 {"grad", BceGrad},
                 {"total", BceTotal}},
                Initialize);
  module.def("workspace", &cuda_workspace);
  module.attr("group") = kGroup;
  module.def("known_answer", &known_answer_of_devices_in_use,
             pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("driver_version", &cuda_driver_version);
  module.def("compute_capabilities", &cuda_compute_capabilities);
  module.attr("runtime_version") = cuda_runtime_version();
  module.attr("machine_code") = std::vector<int>{BCE_CUDA_MACHINE_CODE};
  module.attr("ptx") = std::vector<int>{BCE_CUDA_PTX};
}
