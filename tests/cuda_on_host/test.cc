// Runs bce_cuda.cu on the host (cuda_runtime.h beside this file) against the CPU kernel: every bit
// of every result, for all dtypes, and for sizes and addresses around those of every loop. Operands
// and results lie in blocks of exactly their size, for AddressSanitizer to see a read too far.
//
//     test SIZES     0: a few sizes, 1: more of them, 2: all
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/bce_cpu.h"
#include "../../csrc/bce_cuda.h"

namespace {

using namespace jax_bce;

constexpr Type kTypes[] = {Type::kF16, Type::kBF16, Type::kF32, Type::kF64, Type::kBool,
                           Type::kI8,  Type::kU8,   Type::kI16, Type::kI32, Type::kI64};
constexpr const char* kNames[] = {"f16", "bf16", "f32", "f64", "bool",
                                  "i8",  "u8",   "i16", "i32", "i64"};
constexpr int kWidths[] = {2, 2, 4, 8, 1, 1, 1, 2, 4, 8};

int width(Type type) { return kWidths[static_cast<int>(type)]; }
const char* name(Type type) { return kNames[static_cast<int>(type)]; }

// Memory that ends with its last element and begins `offset` elements behind an aligned address.
class Array {
 public:
  Array(Type type, int64_t size, int offset)
      : type_(type),
        bytes_(size * width(type)),
        block_(std::malloc(bytes_ + offset * width(type))) {
    data_ = static_cast<char*>(block_.get()) + offset * width(type);
    std::memset(data_, 0x5a, bytes_);
  }

  void set(int64_t i, double value) {
    const auto put = [&](auto stored) {
      std::memcpy(data_ + i * sizeof stored, &stored, sizeof stored);
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

  // Whether the bits are the same; what is not a number equals its like.
  bool same(const Array& other, int64_t i) const {
    const char *a = data_ + i * width(type_), *b = other.data_ + i * width(type_);
    return std::memcmp(a, b, width(type_)) == 0 || (is_nan(a) && is_nan(b));
  }

  char* data() const { return data_; }

 private:
  bool is_nan(const char* element) const {
    uint64_t bits = 0;
    std::memcpy(&bits, element, width(type_));
    const uint64_t infinity = type_ == Type::kF16    ? 0x7c00
                              : type_ == Type::kBF16 ? 0x7f80
                              : type_ == Type::kF32  ? 0x7f800000
                                                     : 0x7ff0000000000000;
    return (bits & ~(uint64_t{1} << (8 * width(type_) - 1))) > infinity;
  }

  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  Type type_;
  int64_t bytes_;
  std::unique_ptr<void, Free> block_;
  char* data_;
};

// What ffi_cpu.cc does, on one thread.
void bce_cpu(const Problem& problem) {
  const int64_t blocks = (problem.columns() + kBlock - 1) / kBlock;
  if (blocks <= 1) return kBaselineKernel.rows(problem, 0, problem.rows());
  for (int64_t row = 0; row < problem.rows(); ++row) {
    std::vector<double> sums;
    for (int64_t begin = 0; begin < problem.columns(); begin += kBlock)
      sums.push_back(
          kBaselineKernel.block(problem, row, begin, std::min(kBlock, problem.columns() - begin)));
    if (problem.reduce) kBaselineKernel.finish(problem, row, sums.data(), blocks);
  }
}

struct Case {
  Type logits, labels;
  int64_t rows, columns;
  int offset;  // of every array, in elements
  bool reduce, loss, gradient;
  bool one_label, scales;  // a label a row; a scale an element, or a row
  bool wide;               // results of the arithmetic's type
  bool smooth;             // a smoothing an element, or a row
};

std::mt19937 random_bits(1);

double any_logit() {
  const double rare[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 44, -44.5, 88, -95, 104, -110, 1e-30};
  return random_bits() % 64 == 0 ? rare[random_bits() % std::size(rare)]
                                 : std::normal_distribution<double>(0, 5)(random_bits);
}

double any_label() {
  const double soft[] = {0.3, 0.9, 2, -1};
  return random_bits() % 32 == 0 ? soft[random_bits() % std::size(soft)] : random_bits() % 2;
}

bool check(const Case& c) {
  const int64_t size = c.rows * c.columns;
  const Type arithmetic = c.logits == Type::kF64 ? Type::kF64 : Type::kF32;
  const bool element_scales = c.scales && !c.reduce;
  Array logits(c.logits, size, c.offset);
  Array labels(c.labels, c.one_label ? c.rows : size, c.offset);
  Array scale(arithmetic, !c.scales ? 1 : element_scales ? size : c.rows, c.offset);
  for (int64_t i = 0; i < size; ++i) logits.set(i, any_logit());
  for (int64_t i = 0; i < (c.one_label ? c.rows : size); ++i) labels.set(i, any_label());
  for (int64_t i = 0; i < (!c.scales ? 1 : element_scales ? size : c.rows); ++i)
    scale.set(i, c.scales ? 1 + i % 7 : 1);

  const bool element_smoothing = c.smooth && !c.reduce;
  const int64_t smoothings = !c.smooth ? 1 : element_smoothing ? size : c.rows;
  Array smoothing(arithmetic, smoothings, c.offset);
  for (int64_t i = 0; i < smoothings; ++i) smoothing.set(i, c.smooth ? i % 5 / 5.0 : 0);

  Problem problem = {};
  problem.rank = 2;
  problem.shape[0] = c.rows, problem.shape[1] = c.columns;
  problem.logits = {logits.data(), c.logits, {c.columns, 1}};
  problem.labels = {labels.data(), c.labels, {c.one_label ? 1 : c.columns, !c.one_label}};
  problem.scale = {scale.data(),
                   arithmetic,
                   {!c.scales        ? 0
                    : element_scales ? c.columns
                                     : 1,
                    element_scales}};
  problem.smoothing = {smoothing.data(),
                       arithmetic,
                       {!c.smooth           ? 0
                        : element_smoothing ? c.columns
                                            : 1,
                        element_smoothing}};
  problem.reduce = c.reduce;
  problem.inverse_count = 1.0 / std::max<int64_t>(1, c.reduce ? c.columns : 1);

  const Type result = c.wide ? arithmetic : c.logits;
  const Type loss_type = c.reduce ? arithmetic : result;
  const int64_t losses = c.reduce ? c.rows : size;
  std::vector<std::pair<Array, Array>> results;
  for (int i = 0; i < 2; ++i)
    results.emplace_back(Array(loss_type, c.loss ? losses : 0, c.offset),
                         Array(result, c.gradient ? size : 0, c.offset));
  Array workspace(Type::kF64, cuda_workspace(c.rows, c.columns), 0);
  for (int i = 0; i < 2; ++i) {
    problem.loss = {c.loss ? results[i].first.data() : nullptr, loss_type};
    problem.gradient = {c.gradient ? results[i].second.data() : nullptr, result};
    if (i == 0)
      bce_cpu(problem);
    else if (const char* error =
                 bce_cuda(problem, reinterpret_cast<double*>(workspace.data()), nullptr))
      return std::printf("%s\n", error), false;
  }
  int64_t different = 0, first = -1;
  for (int64_t i = 0; i < (c.loss ? losses : 0); ++i)
    if (!results[0].first.same(results[1].first, i) && different++ == 0) first = i;
  for (int64_t i = 0; i < (c.gradient ? size : 0); ++i)
    if (!results[0].second.same(results[1].second, i) && different++ == 0) first = i;
  if (different)
    std::printf(
        "%lld differ, the first at %lld: logits %s, labels %s, %lld x %lld, offset %d, "
        "reduce %d, loss %d, gradient %d, one_label %d, scales %d, wide %d, smooth %d\n",
        static_cast<long long>(different), static_cast<long long>(first), name(c.logits),
        name(c.labels), static_cast<long long>(c.rows), static_cast<long long>(c.columns), c.offset,
        c.reduce, c.loss, c.gradient, c.one_label, c.scales, c.wide, c.smooth);
  return !different;
}

}  // namespace

int main(int, char** arguments) {
  const int effort = std::atoi(arguments[1]);
  std::vector<int64_t> columns;
  const int step = effort == 2 ? 1 : effort == 1 ? 7 : 61;
  for (int64_t n = 0; n < 300; n += step) columns.push_back(n);
  for (int64_t edge : {512, 1024, 2048, 8192, 16384, 24576})
    for (int64_t n = edge - (effort ? 5 : 1); n <= edge + (effort ? 5 : 1); ++n)
      columns.push_back(n);

  int64_t cases = 0, failed = 0;
  const auto run = [&](const Case& c) { ++cases, failed += !check(c); };
  // Every size, in the shapes of a loss that is trained with.
  for (int64_t n : columns) {
    const int offset = cases % 4;
    run({Type::kF32, Type::kF32, 1, n, offset, true, true, true, false, false, false, false});
    run({Type::kF32, Type::kU8, 3, n, offset, true, true, n % 2 == 0, false, n % 3 == 0, false,
         n % 5 == 0});
    run({Type::kBF16, Type::kU8, 2, n, offset, n % 2 == 0, true, true, false, false, false,
         n % 3 == 0});
    run({Type::kF32, Type::kF32, 1, n, offset, false, n % 2 == 0, true, false, true, false,
         n % 3 == 0});
  }
  // Every pair of dtypes, in every kind of call.
  for (Type logits : {Type::kF16, Type::kBF16, Type::kF32, Type::kF64})
    for (Type labels : kTypes)
      for (int kind = 0; kind < 32; ++kind) {
        const bool reduce = kind & 1, wide = kind & 2, one_label = kind & 4, scales = kind & 8;
        const int64_t n = kind & 16 ? 1024 + 13 * (1 + cases % 5) : 1 + cases % 70;
        for (int results = 1; results < 4; ++results)
          if (effort || results == 3 || cases % 8 == 0)
            run({logits, labels, n > 1000 ? 2 : 19, n, static_cast<int>(cases % 4),
                 reduce && (results & 1), (results & 1) != 0, (results & 2) != 0, one_label, scales,
                 wide, cases % 3 == 0});
      }
  std::printf("%lld cases, %lld failed\n", static_cast<long long>(cases),
              static_cast<long long>(failed));
  return failed != 0;
}
