// The CPU loop over plain pointers. bce_cpu.cc is compiled once per instruction set; each object
// offers this table, and ffi_cpu.cc picks one at load.
#pragma once

#include "bce_problem.h"

namespace jax_bce {

// The functions set the floating-point mode they need, gradual underflow, and restore the caller's.
struct CpuKernel {
  const char* instruction_set;
  // Evaluates elements [begin, begin + size) of a row, size <= kBlock and begin a multiple of
  // kBlock. Returns the sum of the element losses if problem.reduce.
  double (*block)(const Problem& problem, int64_t row, int64_t begin, int64_t size);
  // Evaluates rows [first, last), of one block each, and finishes them if problem.reduce.
  void (*rows)(const Problem& problem, int64_t first, int64_t last);
  // Writes the loss of a longer row from the sums of its blocks.
  void (*finish)(const Problem& problem, int64_t row, const double* sums, int64_t blocks);
};

extern const CpuKernel kBaselineKernel;  // x86-64-v3, or plain aarch64
extern const CpuKernel kAvx512Kernel;    // x86-64-v4

}  // namespace jax_bce
