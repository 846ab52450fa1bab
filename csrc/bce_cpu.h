// The CPU kernels over plain pointers: one per instruction set, of which ffi_cpu.cc picks one at
// load.
#pragma once

#include "bce_problem.h"

namespace jax_bce {

// The loop over elements in one type of arithmetic. The functions set the floating-point mode they
// need, gradual underflow, and restore the caller's.
struct CpuLoop {
  // Evaluates elements [begin, begin + size) of a row, size <= kBlock and begin a multiple of
  // kBlock. Returns the sum of the element losses if problem.reduce.
  double (*block)(const Problem& problem, int64_t row, int64_t begin, int64_t size);
  // Evaluates rows [first, last), of one block each, and finishes them if problem.reduce.
  void (*rows)(const Problem& problem, int64_t first, int64_t last);
  // Writes the loss of a longer row from the sums of its blocks.
  void (*finish)(const Problem& problem, int64_t row, const double* sums, int64_t blocks);
};

struct CpuKernel {
  const char* instruction_set;
  const CpuLoop &float32, &float64;

  const CpuLoop& loop(const Problem& problem) const {
    return problem.scale.type == Type::kF64 ? float64 : float32;
  }
};

// The sources of the loops are compiled once per instruction set, into a namespace of that name.
namespace baseline {
extern const CpuLoop kFloat32, kFloat64;
}
namespace avx512 {
extern const CpuLoop kFloat32, kFloat64;
}

#if defined(__x86_64__)
constexpr CpuKernel kBaselineKernel = {"x86-64-v3", baseline::kFloat32, baseline::kFloat64};
constexpr CpuKernel kAvx512Kernel = {"x86-64-v4", avx512::kFloat32, avx512::kFloat64};
#else
constexpr CpuKernel kBaselineKernel = {"aarch64", baseline::kFloat32, baseline::kFloat64};
#endif

}  // namespace jax_bce
