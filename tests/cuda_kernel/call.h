// One call of the kernels, with its operands and results in the host's memory, where the CPU kernel
// works, and in the device's, where the CUDA kernel does. Under on_host/cuda_runtime.h the device's
// memory is the host's too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/bce_cpu.h"
#include "../../csrc/bce_cuda.h"

namespace jax_bce {

// After an error CUDA does nothing more in this process.
inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA says: %s\n", cudaGetErrorString(error));
  std::exit(3);
}
inline void must(const char* error) {
  if (!error) return;
  std::printf("CUDA says: %s\n", error);
  std::exit(3);
}

struct FreeOnHost {
  void operator()(char* block) const { std::free(block); }
};
struct FreeOnDevice {
  void operator()(char* block) const { must(cudaFree(block)); }
};
using HostMemory = std::unique_ptr<char, FreeOnHost>;
using DeviceMemory = std::unique_ptr<char, FreeOnDevice>;

inline DeviceMemory device_memory(int64_t bytes) {
  void* block = nullptr;
  if (bytes > 0) must(cudaMalloc(&block, bytes));
  return DeviceMemory(static_cast<char*>(block));
}

constexpr int kWidths[] = {2, 2, 4, 8, 1, 1, 1, 2, 4, 8};
constexpr int width(Type type) { return kWidths[static_cast<int>(type)]; }

// Blocks that end with their last element, for AddressSanitizer and compute-sanitizer to see a read
// too far, and begin `offset` elements behind an aligned address. They are filled with 0x5a, which
// no result is.
class Array {
 public:
  Array(Type type, int64_t size, int offset)
      : type_(type),
        offset_(int64_t{offset} * width(type)),
        bytes_(size * width(type)),
        host_(static_cast<char*>(std::malloc(offset_ + bytes_))),
        device_(device_memory(offset_ + bytes_)) {
    std::memset(host(), 0x5a, bytes_);
    poison();
  }

  char* host() const { return host_.get() + offset_; }
  char* device() const { return device_.get() + offset_; }
  std::vector<char> copy() const { return std::vector<char>(host(), host() + bytes_); }
  void poison() const { must(cudaMemset(device(), 0x5a, bytes_)); }
  void upload() const { must(cudaMemcpy(device(), host(), bytes_, cudaMemcpyHostToDevice)); }
  std::vector<char> download() const {
    std::vector<char> found(bytes_);
    must(cudaMemcpy(found.data(), device(), bytes_, cudaMemcpyDeviceToHost));
    return found;
  }

  void set(int64_t i, double value) {
    const auto put = [&](auto stored) {
      std::memcpy(host() + i * sizeof stored, &stored, sizeof stored);
    };
    const auto bfloat16 = [](float value) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      return static_cast<uint16_t>(bits >> 16);
    };
    switch (type_) {
      case Type::kF16:
        return put(static_cast<_Float16>(value));
      case Type::kBF16:
        return put(bfloat16(value));
      case Type::kF32:
        return put(static_cast<float>(value));
      case Type::kF64:
        return put(value);
      case Type::kBool:
        return put(static_cast<uint8_t>(value != 0));
      case Type::kI8:
        return put(static_cast<int8_t>(value));
      case Type::kU8:
        return put(static_cast<uint8_t>(std::fabs(value)));
      case Type::kI16:
        return put(static_cast<int16_t>(value));
      case Type::kI32:
        return put(static_cast<int32_t>(value));
      case Type::kI64:
        return put(static_cast<int64_t>(value));
    }
  }

 private:
  Type type_;
  int64_t offset_, bytes_;
  HostMemory host_;
  DeviceMemory device_;
};

struct Case {
  Type logits, labels;
  int64_t rows, columns;
  int offset;  // of every array, in elements
  bool reduce, loss, gradient;
  bool one_label, scales;  // a label a row; a scale an element, or a row
  bool wide;               // results of the arithmetic's type, sums of float64
  bool smooth;             // a smoothing an element, or a row
  bool other = false;      // results of another 16-bit type
  int modifiers = 0;       // a bit for each there is
  int form = 0;            // what they are: one number, one a row, one a column, one an element
  int divisors = 0;        // none, one number, one a row, one an element (or a row, if they add up)
  bool total = false;      // weights in the place of losses
  bool common = false;  // no rare numbers, modifiers of the usual types, the same smoothing for all
  int softness = 0;     // of common ones: 1 for smoothed labels, 2 for soft ones, 3 for both
  bool huge = false;    // weights whose products overflow
  bool padded = false;  // logits far from 0 among common ones
};

inline std::mt19937 random_bits(1);

// One number in so many is rare: few enough, in two calls of three, that whole turns have none.
inline int one_in = 64;
inline bool is_rare() { return random_bits() % one_in == 0; }

inline double any_logit() {
  const double rare[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 44, -44.5, 88, -95, 104, -110, 1e-30};
  return is_rare() ? rare[random_bits() % std::size(rare)]
                   : std::normal_distribution<double>(0, 5)(random_bits);
}

// Seldom infinite, as then the whole turn is evaluated in another way.
inline double far_logit() {
  const double far[] = {-1e9, 1e9, -INFINITY, 105, -105, 44.5, -44.5};
  if (random_bits() % 128 == 0) return INFINITY;
  if (random_bits() % 2) return far[random_bits() % std::size(far)];
  const double between = 44 + random_bits() % (61 << 20) * 0x1p-20;  // up to 105
  return random_bits() % 2 ? between : -between;
}

inline double any_label() {
  const double soft[] = {0.3, 0.9, 2, -1};
  return is_rare() ? soft[random_bits() % std::size(soft)] : random_bits() % 2;
}

// Operands are random, results not yet computed.
struct Call {
  const Case c;
  const bool element_scales = c.scales && !c.reduce, element_smoothing = c.smooth && !c.reduce;
  const int64_t size = c.rows * c.columns, losses = c.reduce ? c.rows : size;
  const Type arithmetic = c.logits == Type::kF64 ? Type::kF64 : Type::kF32;
  const Type gradient_type = c.other  ? c.logits == Type::kF16 ? Type::kBF16 : Type::kF16
                             : c.wide ? arithmetic
                                      : c.logits;
  const Type loss_type = !c.reduce ? gradient_type : c.wide ? Type::kF64 : arithmetic;
  const int64_t labels_size = c.one_label ? c.rows : size;
  const bool element_divisors = c.divisors == 3 && !c.reduce;
  const int64_t divisors_size = c.divisors < 2 ? c.divisors : element_divisors ? size : c.rows;
  const int64_t scales_size = !c.scales ? 1 : element_scales ? size : c.rows;
  const int64_t smoothings_size = !c.smooth ? 1 : element_smoothing ? size : c.rows;
  Array logits{c.logits, size, c.offset}, labels{c.labels, labels_size, c.offset};
  Array scale{arithmetic, scales_size, c.offset}, smoothing{arithmetic, smoothings_size, c.offset};
  Array divisor{arithmetic, divisors_size, c.offset}, lost{arithmetic, divisors_size, c.offset};
  Array loss{loss_type, c.loss ? losses : 0, c.offset};
  Array gradient{gradient_type, c.gradient ? size : 0, c.offset};
  Array workspace{Type::kF64, cuda_workspace(c.rows, c.columns), 0};
  std::vector<Array> modifiers;

  Type modifier_type(int name) const {
    const Type weights[] = {Type::kF32, Type::kF64, Type::kU8, Type::kBF16, Type::kI32, Type::kF16};
    return name == kWhere         ? Type::kBool
           : name == kIgnoreLabel ? c.labels
           : c.common             ? Type::kF32
                                  : weights[(c.form + name) % std::size(weights)];
  }
  bool is_one(int name) const { return c.common && name == kIgnoreLabel; }
  bool by_row(int name) const { return !is_one(name) && (c.form + name) % 4 & 1; }
  bool by_column(int name) const { return !is_one(name) && (c.form + name) % 4 & 2; }

  explicit Call(const Case& chosen) : c(chosen) {
    one_in = c.common ? 1 << 30 : 64 << random_bits() % 3 * 6;  // 64, 4096 or 262144
    for (int64_t i = 0; i < size; ++i)
      logits.set(i, c.padded && random_bits() % 50 == 0 ? far_logit() : any_logit());
    for (int64_t i = 0; i < labels_size; ++i) labels.set(i, any_label());
    for (int64_t i = 0; i < scales_size; ++i) scale.set(i, c.scales ? 1 + i % 7 : 1);
    for (int64_t i = 0; i < smoothings_size; ++i)
      smoothing.set(i, c.smooth ? i % 5 / 5.0 : c.softness % 2 * 0.1);
    for (int64_t i = 0; c.softness > 1 && i < labels_size; ++i)
      labels.set(i, random_bits() % 8 / 7.0);
    for (int64_t i = 0; i < divisors_size; ++i) {
      const double rare[] = {0, 1e-38, -1e-33, 1e37, INFINITY, NAN};
      const bool is_rare = random_bits() % 8 == 0;
      divisor.set(i, is_rare ? rare[random_bits() % std::size(rare)] : 1 + i % 9 / 7.0);
      lost.set(i, is_rare ? 0 : random_bits() % 9 * 1e-9);
    }
    for (const Array* operand : {&logits, &labels, &scale, &smoothing, &divisor, &lost})
      operand->upload();
    for (int name = 0; name < kModifiers; ++name) {
      const bool given = c.modifiers >> name & 1;
      const int64_t count = (by_row(name) ? c.rows : 1) * (by_column(name) ? c.columns : 1);
      modifiers.emplace_back(modifier_type(name), given ? count : 0, c.offset);
      const double numbers[] = {c.huge ? 3e38 : 0, 1, 3, 0.3, -2},
                   alphas[] = {0, 0.25, 1, 0.7, 0.5}, gammas[] = {2, 0.5, 0, 4, 1},
                   clips[] = {0.05, 0, 0.2, 0.5, 0.9};
      const int usual = random_bits() % 2 ? 1 : 5;  // of the first, or of all
      for (int64_t i = 0; given && i < count; ++i)
        modifiers[name].set(i, name == kWhere         ? random_bits() % 4 != 0
                               : name == kIgnoreLabel ? random_bits() % 2
                               : name == kAlpha       ? alphas[random_bits() % 5]
                               : name == kClip        ? clips[random_bits() % usual]
                               : name > kAlpha        ? gammas[random_bits() % usual]
                               : is_rare()            ? INFINITY
                                                      : numbers[random_bits() % 5]);
      modifiers[name].upload();
    }
  }

  // In the memory that `data` tells, &Array::host or &Array::device.
  Problem problem(char* (Array::*data)() const) const {
    const auto row_stride = [&](bool varies, bool by_element) {
      return !varies ? 0 : by_element ? c.columns : 1;
    };
    Problem problem = {};
    problem.rank = 2;
    problem.shape[0] = c.rows, problem.shape[1] = c.columns;
    problem.logits = {(logits.*data)(), c.logits, {c.columns, 1}};
    problem.labels = {(labels.*data)(), c.labels, {row_stride(true, !c.one_label), !c.one_label}};
    problem.scale = {
        (scale.*data)(), arithmetic, {row_stride(c.scales, element_scales), element_scales}};
    problem.smoothing = {(smoothing.*data)(),
                         arithmetic,
                         {row_stride(c.smooth, element_smoothing), element_smoothing}};
    if (c.divisors) {
      problem.divisor = {(divisor.*data)(),
                         arithmetic,
                         {row_stride(c.divisors > 1, element_divisors), element_divisors}};
      problem.divisor_low = problem.divisor;
      problem.divisor_low.data = (lost.*data)();
    }
    problem.total = c.total;
    problem.reduce = c.reduce;
    problem.inverse_count = 1.0 / std::max<int64_t>(1, c.reduce ? c.columns : 1);
    problem.loss = {c.loss ? (loss.*data)() : nullptr, loss_type};
    problem.gradient = {c.gradient ? (gradient.*data)() : nullptr, gradient_type};
    problem.modified = c.modifiers & ((1 << kModifiersOfAll) - 1);
    problem.constant_power = c.form % 3 == 1;
    for (int name = 0; name < kModifiers; ++name) {
      if (!(c.modifiers >> name & 1)) continue;
      Modifier& modifier = problem.modifiers[name];
      modifier.data = (modifiers[name].*data)();
      modifier.type = modifier_type(name);
      modifier.rank = 2;
      modifier.shape[0] = c.rows, modifier.shape[1] = c.columns;
      modifier.strides[0] = !by_row(name) ? 0 : by_column(name) ? c.columns : 1;
      modifier.strides[1] = by_column(name);
    }
    return problem;
  }

  void enqueue(const Problem& problem, cudaStream_t stream) const {
    must(bce_cuda(problem, reinterpret_cast<double*>(workspace.device()), stream));
  }
  void enqueue(cudaStream_t stream) const { enqueue(problem(&Array::device), stream); }

  void poison() const {
    for (const Array* result : {&loss, &gradient, &workspace}) result->poison();
  }
};

// What ffi_cpu.cc does, on one thread.
inline std::vector<double> sums_of_blocks(const Problem& problem, int64_t row) {
  const CpuLoop& loop = kBaselineKernel.loop(problem);
  std::vector<double> sums;
  for (int64_t begin = 0; begin < problem.columns(); begin += kBlock)
    sums.push_back(loop.block(problem, row, begin, std::min(kBlock, problem.columns() - begin)));
  return sums;
}

inline void bce_cpu(const Problem& problem) {
  const CpuLoop& loop = kBaselineKernel.loop(problem);
  if (problem.columns() <= kBlock) return loop.rows(problem, 0, problem.rows());
  for (int64_t row = 0; row < problem.rows(); ++row) {
    const std::vector<double> sums = sums_of_blocks(problem, row);
    if (problem.reduce) loop.finish(problem, row, sums.data(), sums.size());
  }
}

}  // namespace jax_bce
