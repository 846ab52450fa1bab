// The known-answer test of the kernels as they run on the host, and of faulty ones. The kernels'
// source is compiled with its functions renamed to healthy_bce_cuda and healthy_cuda_scratch.
//
//     test [FAULT]
//
// Tests the devices that the driver says are in use, twice. Prints how often the kernels were
// called, and what fails.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/bce_cuda.h"
#include "../../csrc/known_answer.h"

namespace jax_bce {

const char* healthy_bce_cuda(const Problem& problem, double* workspace, CUstream_st* stream);
const char* healthy_cuda_scratch(char** memory);

namespace {
std::string fault;
int calls = 0;
}  // namespace

// What a faulty kernel does.
const char* bce_cuda(const Problem& given, double* workspace, CUstream_st* stream) {
  ++calls;
  Problem problem = given;
  const int64_t size = problem.rows() * problem.columns();
  std::vector<uint8_t> labels;
  if (fault == "tail" && problem.rows() == 1) problem.shape[1] -= problem.columns() % 4;
  if (fault == "short tail" && problem.rows() == 1) problem.shape[1] -= 1;
  if (fault == "swapped labels" && problem.labels.type == Type::kU8) {
    for (int64_t i = 0; i < size; ++i)
      labels.push_back(!static_cast<const uint8_t*>(problem.labels.data)[i]);
    problem.labels.data = labels.data();
  }
  if (fault == "no image for a kernel" && problem.logits.type == Type::kF16)
    return cudaGetErrorString(kNoImage);
  if (fault == "no memory") return cudaGetErrorString(cudaErrorMemoryAllocation);
  const char* error = healthy_bce_cuda(problem, workspace, stream);
  auto* gradient = static_cast<char*>(problem.gradient.data);
  if (!gradient || problem.gradient.type != Type::kF32) return error;
  if (fault == "beside") gradient[size * sizeof(float)] = 0;
  if (fault == "changing" && calls > 100 && calls % 2 == 0) gradient[4 * (size - 1)] ^= 1;
  if (fault == "ulps") gradient[4 * (size / 2)] ^= 4;
  return error;
}

const char* cuda_scratch(char** memory) {
  return fault == "no image" ? cudaGetErrorString(kNoImage) : healthy_cuda_scratch(memory);
}

}  // namespace jax_bce

int main(int count, char** arguments) {
  using namespace jax_bce;
  if (count > 1) fault = arguments[1];
  old_driver = fault == "old driver";
  const std::string first = known_answer_of_devices_in_use();
  const int first_calls = calls;
  const std::string second = known_answer_of_devices_in_use();
  std::printf("%d calls, then %d\n%s\n", first_calls, calls - first_calls, first.c_str());
  return first != second;
}
