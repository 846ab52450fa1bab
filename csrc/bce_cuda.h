// The CUDA loop over plain pointers and a stream.
#pragma once

#include <cstddef>
#include <vector>

#include "bce_problem.h"

struct CUstream_st;  // *cudaStream_t, without CUDA's headers

namespace jax_bce {

// The number of float64 values that bce_cuda needs for the sums of groups. A row of one group needs
// none.
constexpr int64_t cuda_workspace(int64_t rows, int64_t columns) {
  return columns > kGroup ? rows * ((columns + kGroup - 1) / kGroup) : 0;
}

// Enqueues the evaluation on the stream. If the loss has several parts, there must be one for each
// group, and there is no workspace. Returns null, or CUDA's error message.
const char* bce_cuda(const Problem& problem, double* workspace, CUstream_st* stream);

// Memory of the current device for the known-answer test. It is not allocated: that could wait for
// other work. Returns null, or CUDA's error message.
constexpr size_t kScratch = 2400 << 10;
const char* cuda_scratch(char** memory);

// The newest CUDA version that the driver supports, 0 without a driver; and the version that this
// was built with. As CUDA numbers them: 13000 is 13.0.
int cuda_driver_version();
int cuda_runtime_version();

// The compute capability of each GPU that this process may use: 75 is 7.5. Starts the driver, but
// runs nothing on a GPU.
std::vector<int> cuda_compute_capabilities();

}  // namespace jax_bce
