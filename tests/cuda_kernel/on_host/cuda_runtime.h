// CUDA's words, as far as bce_cuda.cu and its test use them, for the host's compiler: so that the
// kernels as they stand run where there is no GPU, under the sanitizers too. A thread is a thread;
// a shuffle and __syncthreads are barriers; thread blocks run one after the other; a launch returns
// when all is done.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <barrier>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

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

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
#define CUDART_VERSION 0

using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
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
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (size > 0) memcpy(to, from, size);
  return cudaSuccess;
}

namespace cuda_on_host {

constexpr int kWarp = 32, kThreads = 256;

class Device {
 public:
  // Runs the kernel on every thread of the grid.
  void run(dim3 grid, std::function<void()> kernel) {
    grid_ = grid;
    kernel_ = std::move(kernel);
    reset();
    begin_.arrive_and_wait();
    end_.arrive_and_wait();
  }

  void sync_threads() { block_->arrive_and_wait(); }

  double shuffle_down(double value, int distance) {
    const int thread = threadIdx.x;
    slots_[thread] = value;
    warps_[thread / kWarp]->arrive_and_wait();
    const bool inside = thread % kWarp + distance < kWarp;
    const double result = inside ? slots_[thread + distance] : value;
    warps_[thread / kWarp]->arrive_and_wait();
    return result;
  }

  Device() {
    for (unsigned i = 0; i < kThreads; ++i) threads_.emplace_back([this, i] { work(i); });
  }
  ~Device() {
    kernel_ = nullptr;
    begin_.arrive_and_wait();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void work(unsigned thread) {
    for (;;) {
      begin_.arrive_and_wait();
      if (!kernel_) return;
      threadIdx = {thread};
      gridDim = grid_;
      for (blockIdx.y = 0; blockIdx.y < grid_.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid_.x; ++blockIdx.x) {
          kernel_();
          // A thread that has returned keeps no other waiting.
          block_->arrive_and_drop();
          warps_[thread / kWarp]->arrive_and_drop();
          next_block_.arrive_and_wait();
        }
      }
      end_.arrive_and_wait();
    }
  }

  void reset() {
    block_.emplace(kThreads);
    for (auto& warp : warps_) warp.emplace(kWarp);
  }

  struct Reset {
    Device* device;
    void operator()() noexcept { device->reset(); }
  };

  dim3 grid_;
  std::function<void()> kernel_;
  std::optional<std::barrier<>> block_, warps_[kThreads / kWarp];
  double slots_[kThreads];
  std::barrier<> begin_{kThreads + 1}, end_{kThreads + 1};
  std::barrier<Reset> next_block_{kThreads, Reset{this}};
  std::vector<std::thread> threads_;
};

inline Device& device() {
  static Device device;
  return device;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::device().sync_threads(); }
inline double __shfl_down_sync(unsigned, double value, int distance) {
  return cuda_on_host::device().shuffle_down(value, distance);
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  void* stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_on_host::device().run(config->gridDim, [=] { kernel(arguments...); });
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
inline double __longlong_as_double(long long bits) { return cast_bits<double>(bits); }
// Of the bytes of low and high, numbered 0 to 7, those that the selector's digits name.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = low | static_cast<unsigned long long>(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
