// CUDA's words, as far as bce_cuda.cu and its test use them, for the host's compiler: so that the
// kernels as they stand run where there is no GPU, under the sanitizers too. A thread is a fiber; a
// shuffle and __syncthreads are barriers, for which all of a warp's or a block's threads have to
// come; thread blocks run one after the other, or together if they are a cluster; a launch returns
// when all is done.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}

// The dynamic shared memory of the thread block that runs.
namespace jax_bce {
constexpr size_t kSharedBytes = 48 << 10;
inline uint4* shared_memory;
}  // namespace jax_bce

// A GPU's approximations, which may be a few ulp off.
inline int exp2_ulps = 0, reciprocal_ulps = 0;
inline float off_by(float value, int ulps) {
  const float below = nextafterf(value, 0);
  return std::isfinite(value) ? value + ulps * (value - below) : value;
}
#define BCE_EXP2_ON_HOST(b) off_by(exp2f(b) < 0x1p-126f ? 0 : exp2f(b), exp2_ulps)
#define BCE_RECIPROCAL_ON_HOST(b) off_by(1 / (b), reciprocal_ulps)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// So few multiprocessors that a thread block has several groups or tiles.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
#define CUDART_VERSION 0

using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** block, size_t size) {
  return *block = malloc(size), cudaSuccess;
}
inline cudaError_t cudaFree(void* block) { return free(block), cudaSuccess; }
inline cudaError_t cudaMemset(void* to, int byte, size_t size) {
  if (size > 0) memset(to, byte, size);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (size > 0) memcpy(to, from, size);
  return cudaSuccess;
}

namespace cuda_on_host {

#ifndef BCE_LARGEST_CLUSTER
#define BCE_LARGEST_CLUSTER 8
#endif

// Of one thread block, or of the thread blocks of a cluster.
constexpr int kWarp = 32, kWarps = std::max(8, 4 * BCE_LARGEST_CLUSTER), kThreads = kWarp * kWarps,
              kBlocks = BCE_LARGEST_CLUSTER;

// Threads are fibers. A warp runs until all of its threads wait, then another one does, in random
// order: so warps get as far ahead of each other as barriers let them.
class Device {
 public:
  Device() {
    use(kThreads);
    for (Fiber& fiber : fibers_) fiber.prepare(&Device::work);
    run_warps();
  }

  // Runs the kernel on every thread of the grid. All of its thread blocks may be a cluster.
  void run(dim3 grid, unsigned threads, bool cluster, std::function<void()> kernel) {
    gridDim = grid;
    threads_ = threads;
    at_once_ = cluster ? grid.x : 1;
    if (at_once_ > kBlocks || at_once_ * threads > kThreads) abort();
    use(at_once_ * threads);
    cluster_.set(at_once_ * threads);
    for (Barrier& block : block_) block.set(threads);
    kernel_ = std::move(kernel);
    for (first_ = 0; first_ < grid.x; first_ += at_once_) run_blocks();
  }

  // Whether a cluster can be launched: not always, as on a GPU that others use, too.
  bool has_room() { return random_() % 8 > 0; }

  void sync_threads() { wait(&block_[block_of(fiber_)]); }
  void sync_cluster() { wait(&cluster_); }

  double shuffle_down(double value, int distance) {
    const int thread = fiber_;
    Barrier* warp = &warps_[thread / kWarp];
    double* slots = slots_[warp->times % 2];  // of the other ones, some may not yet be read
    slots[thread] = value;
    wait(warp);
    return thread % kWarp + distance < kWarp ? slots[thread + distance] : value;
  }

  bool any(bool value) {
    const int thread = fiber_, first = thread / kWarp * kWarp;
    Barrier* warp = &warps_[thread / kWarp];
    double* slots = slots_[warp->times % 2];
    slots[thread] = value;
    wait(warp);
    return std::any_of(slots + first, slots + first + kWarp, [](double slot) { return slot != 0; });
  }

 private:
  struct Barrier {
    int members = kWarp, missing = members;
    int times = 0;         // that all have come
    char passage[2] = {};  // of even and odd times: some may come again before others have left

    void set(int number) { members = missing = number; }

    UNSEEN int come() {
      const int time = times;
      release(&passage[time % 2]);
      if (--missing == 0) missing = members, ++times;
      return time;
    }
    void leave(int time) { acquire(&passage[time % 2]); }
  };

  static void work();

  // The first fibers; the others stay where they are.
  void use(int fibers) {
    blocks_.members = fibers + 1;
    order_.resize(fibers / kWarp);
    std::iota(order_.begin(), order_.end(), 0);
  }

  UNSEEN unsigned block_of(int fiber) const { return fiber / threads_; }

  // Makes the fiber's thread the one that runs.
  UNSEEN void choose(int fiber) {
    const unsigned block = block_of(fiber);
    fiber_ = fiber;
    threadIdx = {fiber % threads_};
    blockIdx = {first_ + block};
    jax_bce::shared_memory = memory_[block % kBlocks];
  }

  UNSEEN void wait(Barrier* barrier) {
    waits_[fiber_] = {barrier, barrier->come()};
    fibers_[fiber_].switch_to(&host_);
    barrier->leave(barrier->times - 1);
  }

  UNSEEN bool run_warp(int warp) {
    bool ran = false;
    for (int thread = warp * kWarp; thread < (warp + 1) * kWarp; ++thread) {
      const Wait& wait = waits_[thread];
      if (wait.barrier && wait.barrier->times == wait.time) continue;
      choose(thread);
      host_.switch_to(&fibers_[thread]);
      ran = true;
    }
    return ran;
  }

  bool run_warps() {
    bool ran = false;
    std::shuffle(order_.begin(), order_.end(), random_);
    for (int warp : order_)
      while (run_warp(warp)) ran = true;
    return ran;
  }

  void run_blocks() {
    const int time = blocks_.come();
    while (run_warps()) {
    }
    if (blocks_.missing > 1) {
      fprintf(stderr, "threads wait for others that have ended, or wait elsewhere\n");
      abort();
    }
    blocks_.leave(time + 1);
  }

  struct Wait {
    const Barrier* barrier;
    int time;
  };

  std::function<void()> kernel_;
  unsigned threads_ = kThreads, at_once_ = 1, first_ = 0;
  int fiber_ = 0;
  std::minstd_rand random_;
  std::vector<int> order_;  // of warps
  Fiber host_, fibers_[kThreads];
  Wait waits_[kThreads] = {};
  Barrier blocks_{kThreads + 1}, cluster_, block_[kBlocks], warps_[kWarps];
  double slots_[2][kThreads];
  uint4 memory_[kBlocks][jax_bce::kSharedBytes / sizeof(uint4)];
};

inline Device device;

inline void Device::work() {
  device.fibers_[device.fiber_].arrived(&device.host_);
  for (;;) {
    device.wait(&device.blocks_);
    device.kernel_();
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::device.sync_threads(); }
inline double __shfl_down_sync(unsigned, double value, int distance) {
  return cuda_on_host::device.shuffle_down(value, distance);
}

#define BCE_SYNC_CLUSTER_ON_HOST() cuda_on_host::device.sync_cluster()
inline int __any_sync(unsigned, int value) { return cuda_on_host::device.any(value); }

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  void* stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Of a GPU with clusters, if smaller ones than most have; or without any.
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed };
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->ptxVersion = cuda_on_host::kBlocks > 1 ? 90 : 80, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel,
                                           const cudaLaunchConfig_t* config) {
  const unsigned blocks = config->attrs->val.clusterDim.x;
  *clusters =
      blocks <= cuda_on_host::kBlocks && blocks * config->blockDim.x <= cuda_on_host::kThreads;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (config->dynamicSmemBytes > jax_bce::kSharedBytes) abort();
  const bool cluster =
      config->numAttrs > 0 && config->attrs->id == cudaLaunchAttributeClusterDimension;
  if (cluster && config->attrs->val.clusterDim.x != config->gridDim.x) abort();
  if (cluster && !cuda_on_host::device.has_room()) return cudaErrorInvalidValue;
  cuda_on_host::device.run(config->gridDim, config->blockDim.x, cluster,
                           [=] { kernel(arguments...); });
  return cudaSuccess;
}

template <class To, class From>
To cast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return cast_bits<float>(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline double __longlong_as_double(long long bits) { return cast_bits<double>(bits); }
// Of the bytes of low and high, numbered 0 to 7, those that the selector's digits name.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = low | static_cast<unsigned long long>(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
