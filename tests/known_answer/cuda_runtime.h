// What known_answer.cc needs besides, and what an old driver or a missing image does, if test.cc
// says so.
#pragma once

#define cudaGetErrorString no_error
#include "../cuda_kernel/on_host/cuda_runtime.h"
#undef cudaGetErrorString

inline bool old_driver = false;
constexpr cudaError_t kOldDriver = static_cast<cudaError_t>(35);
constexpr cudaError_t kNoImage = static_cast<cudaError_t>(209);
constexpr cudaError_t cudaErrorMemoryAllocation = static_cast<cudaError_t>(2);
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  return error == kOldDriver ? "CUDA driver version is insufficient for CUDA runtime version"
                             : "no kernel image is available for execution on the device";
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return old_driver ? kOldDriver : cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                                   cudaStream_t) {
  return cudaMemcpy(to, from, size, kind);
}
