// The CUDA loop over plain pointers and a stream.
#pragma once

#include <vector>

#include "bce_problem.h"

struct CUstream_st;  // *cudaStream_t, without CUDA's headers

namespace jax_bce {

// How many float64 numbers bce_cuda needs for the sums of the blocks. A row of one block needs
// none.
constexpr int64_t cuda_workspace(int64_t rows, int64_t columns) {
  return columns > kBlock ? rows * ((columns + kBlock - 1) / kBlock) : 0;
}

// Enqueues the evaluation on the stream. Returns null, or what is wrong in CUDA's words.
const char* bce_cuda(const Problem& problem, double* workspace, CUstream_st* stream);

// As CUDA numbers them: 13000 is 13.0. The newest CUDA that the driver runs, 0 where there is no
// driver; and the one that this was built with.
int cuda_driver_version();
int cuda_runtime_version();

// Of each GPU that this process may use: 75 is 7.5. Starts the driver, but nothing on a GPU.
std::vector<int> cuda_compute_capabilities();

}  // namespace jax_bce
