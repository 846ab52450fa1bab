// The CPU loop over plain pointers. bce_cpu.cc is compiled once per instruction set; each object
// offers this table, and ffi_cpu.cc picks one at load.
#pragma once

#include "bce_problem.h"

namespace jax_bce {

// A row is cut into blocks of this many elements, whatever the thread count and instruction set.
// Inside a block the elements are added in one fixed order, and the blocks' sums in block order.
constexpr int64_t kBlock = 8192;

struct CpuKernel {
  const char* instruction_set;
  // Evaluates elements [begin, begin + size) of a row, size <= kBlock and begin a multiple of
  // kBlock. Returns the sum of the element losses if problem.reduce. Sets the floating-point mode
  // it needs (gradual underflow) and restores the caller's.
  double (*block)(const Problem& problem, int64_t row, int64_t begin, int64_t size);
};

extern const CpuKernel kBaselineKernel;  // x86-64-v3, or plain aarch64
extern const CpuKernel kAvx512Kernel;    // x86-64-v4

}  // namespace jax_bce
