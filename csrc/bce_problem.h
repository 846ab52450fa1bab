// Describes what a kernel computes, in plain C++. Shared by the CPU and CUDA loops, which do not
// depend on XLA, and by the FFI handlers, which fill it in.
#pragma once

#include <cstdint>

#include "bce_math.h"

namespace jax_bce {

// The order of a row's sum is the same on every platform, so that all of them give the same bits:
//   - A group of 1024 elements is added up by 32 threads. For k = 0, ..., 7, in this order,
//     thread t takes the four elements 256 (t / 8) + 32 k + 4 (t % 8) + c, c = 0, ..., 3, and adds
//     each c to its own lane; then it adds its lanes as (0 + 2) + (1 + 3).
//   - Threads are folded by halves: t and t + 16, then t + 8, t + 4, t + 2, t + 1.
//   - A block is 8 groups, added in order.
//   - The blocks of a row are added up by 256 threads: thread t takes t, t + 256, t + 512, ... in
//     this order. Each 32 threads are folded by halves, and the 8 sums are added in order.
// All sums are in float64, except that a lane first adds the low parts of its losses, which are
// pairs, in the arithmetic's type: they are small enough. For 16-bit logits, whose losses are not
// pairs, a lane first adds up some elements in float32. (A GPU does so in another order, too.)
constexpr int kQuad = 4, kFold = 32, kGroup = 1024, kGroupsInBlock = 8;
constexpr int64_t kBlock = kGroupsInBlock * kGroup;

enum class Type : uint8_t { kF16, kBF16, kF32, kF64, kBool, kI8, kU8, kI16, kI32, kI64 };
BCE_INLINE bool is_float(Type type) { return type <= Type::kF64; }

// An operand is read as stored. Its strides, in elements, are 0 where it is broadcast.
constexpr int kMaxRank = 16;

struct Operand {
  const void* data;
  Type type;
  int64_t strides[kMaxRank];
};

// An operand with its own shape, which is broadcast to the shape of the results. The value for
// element i of a result, in storage order, is at offset(i). The last dimension's stride is 0 or 1.
struct Modifier {
  const void* data = nullptr;  // null: not given
  Type type = Type::kF32;
  int rank = 0;
  int64_t shape[kMaxRank] = {}, strides[kMaxRank] = {};

  BCE_INLINE int64_t offset(int64_t element) const {
    int64_t offset = 0;
    for (int d = rank - 1; d > 0; --d) {
      offset += element % shape[d] * strides[d];
      element /= shape[d];
    }
    return offset + element * strides[0];
  }
};

// In the order in which they follow the other operands. Each is a bit of the attribute "modifiers".
// With kGamma, the loss is focal or asymmetric (bce_focal.h). It is the gamma of label 0, and,
// without kGammaPos, of label 1. kHessFloor is the least second derivative, before weights.
enum ModifierName {
  kWeight,
  kSampleWeight,
  kPosWeight,
  kWhere,
  kIgnoreLabel,
  kAlpha,
  kGamma,
  kGammaPos,
  kClip,
  kHessFloor,
  kModifiers
};

constexpr int kModifiersOfAll = kAlpha;         // those of every loss
constexpr int kModifiersOfLosses = kHessFloor;  // those of any loss

struct Result {
  void* data = nullptr;  // null: not requested
  Type type = Type::kF32;
};

// Where a row starts in each operand, in elements.
struct RowStart {
  int64_t logits, labels, scale, smoothing, divisor, divisor_low;
};

// The factor of the results: scale / count / divisor. If it exceeds the safe range of a Scalar's
// exponent, weights are multiplied by `power`, and `rest` is the remaining factor.
template <class Scalar>
struct Factor {
  static constexpr double kPower = sizeof(Scalar) == 4 ? 0x1p100 : 0x1p900;
  double scale, divisor, power;
  Scalar rest;

  BCE_INLINE Factor(double scale_over_count, double divisor)
      : scale(scale_over_count), divisor(divisor), power(1), rest(0) {
    if (is_zero()) return;
    double ratio = scale / divisor;
    const double magnitude = ratio < 0 ? -ratio : ratio;
    if (magnitude > kPower || magnitude < 1 / kPower) {
      power = magnitude > kPower ? kPower : 1 / kPower;
      scale /= power;
      ratio = scale / divisor;
    }
    rest = static_cast<Scalar>(ratio);
  }

  // If so, the results are 0, whatever the elements are.
  BCE_INLINE bool is_zero() const { return scale == 0 || divisor == 0; }
  // The result for a sum of elements whose weights include `power`.
  BCE_INLINE double times(double sum) const { return is_zero() ? 0 : sum * scale / divisor; }
};

// loss = scale / count / divisor * (element, or the sum of a row of elements), and the same for the
// gradient. There are as few dimensions as the operands' strides allow. The last one is a row:
// contiguous or broadcast in every operand, and summed into one loss if `reduce`.
// scale, smoothing and divisor have the arithmetic's type: float64 for float64 logits, float32
// otherwise. smoothing moves a label towards 1/2. The divisor comes with its rounding error;
// without a divisor it is 1. If scale or divisor is 0, the results are 0, whatever the element is.
// weight and sample_weight multiply an element's results; pos_weight multiplies its label in the y
// term of the formulas. An element is masked, and its results are 0, if `where` is false or if its
// label, as stored, is ignore_label, which has the labels' type.
// If there is a gamma, the loss is focal or asymmetric, and there is no pos_weight.
// If `total`, losses are replaced by the weights of the elements that are not masked.
// If `hessian`, losses are replaced by second derivatives, of which none is below the floor.
// If `parts` is more than 1, everything is summed, and the loss is as many float64 numbers: the
// caller adds them up. Which are 0 depends on the kernel.
struct Problem {
  int rank;
  int64_t shape[kMaxRank];
  Operand logits, labels, scale, smoothing, divisor, divisor_low;
  bool total = false, hessian = false;
  Modifier modifiers[kModifiers];
  bool modified;        // whether there are modifiers up to kIgnoreLabel
  bool constant_power;  // whether the focal power has no derivative
  Result loss, gradient;
  bool reduce;
  int64_t parts = 1;
  double inverse_count;

  BCE_INLINE RowStart row_start(int64_t row) const {
    RowStart start = {0, 0, 0, 0, 0, 0};
    const auto advance = [&](int dimension, int64_t steps) {
      start.logits += steps * logits.strides[dimension];
      start.labels += steps * labels.strides[dimension];
      start.scale += steps * scale.strides[dimension];
      start.smoothing += steps * smoothing.strides[dimension];
      start.divisor += steps * divisor.strides[dimension];
      start.divisor_low += steps * divisor_low.strides[dimension];
    };
    for (int d = rank - 2; d > 0; --d) {
      advance(d, row % shape[d]);
      row /= shape[d];
    }
    if (rank > 1) advance(0, row);
    return start;
  }

  // The factor of an element of a row.
  template <class Scalar>
  BCE_INLINE Factor<Scalar> factor_at(const RowStart& start, int64_t column) const {
    const auto number = [&](const Operand& operand, int64_t first, double absent) {
      const Scalar* data = static_cast<const Scalar*>(operand.data);
      return data ? static_cast<double>(data[first + column * operand.strides[rank - 1]]) : absent;
    };
    return {number(scale, start.scale, 1) * inverse_count,
            number(divisor, start.divisor, 1) + number(divisor_low, start.divisor_low, 0)};
  }

  BCE_INLINE bool is_focal() const { return modifiers[kGamma].data; }
  BCE_INLINE int64_t columns() const { return shape[rank - 1]; }
  BCE_INLINE int64_t rows() const {
    int64_t rows = 1;
    for (int i = 0; i < rank - 1; ++i) rows *= shape[i];
    return rows;
  }
};

}  // namespace jax_bce
