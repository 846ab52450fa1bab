// What a kernel is asked to compute, in plain C++: shared by the CPU and the CUDA loop, which know
// nothing of XLA, and by the FFI handlers, which fill it in.
#pragma once

#include <cstdint>

namespace jax_bce {

enum class Type : uint8_t { kF16, kBF16, kF32, kF64, kBool, kI8, kU8, kI16, kI32, kI64 };

// An operand is read as stored. Its strides, in elements, are 0 where it is broadcast.
constexpr int kMaxRank = 16;

struct Operand {
  const void* data;
  Type type;
  int64_t strides[kMaxRank];
};

struct Result {
  void* data = nullptr;  // null: not asked for
  Type type = Type::kF32;
};

// loss = scale / count * (element, or the sum of a row of elements), gradient likewise.
// The dimensions are as few as the operands' strides allow. The last one holds a row: contiguous
// or broadcast in every operand, and summed into one loss if `reduce`.
// scale has the type of the arithmetic: float64 for float64 logits, float32 otherwise.
struct Problem {
  int rank;
  int64_t shape[kMaxRank];
  Operand logits, labels, scale;
  Result loss, gradient;
  bool reduce;
  int64_t count;

  // Where a row of an operand starts, in elements.
  int64_t row_start(const Operand& operand, int64_t row) const {
    int64_t start = 0;
    for (int d = rank - 2; d >= 0; --d) {
      start += row % shape[d] * operand.strides[d];
      row /= shape[d];
    }
    return start;
  }

  int64_t columns() const { return shape[rank - 1]; }
  int64_t rows() const {
    int64_t rows = 1;
    for (int i = 0; i < rank - 1; ++i) rows *= shape[i];
    return rows;
  }
};

}  // namespace jax_bce
