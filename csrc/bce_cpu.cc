// The CPU loop. A block of a row is evaluated tile by tile: an operand that is not stored in the
// arithmetic's type, is broadcast, or ends inside a tile goes through a buffer in the first-level
// cache. So the arithmetic is compiled once per scalar type instead of once per pair of dtypes, and
// a tail is computed by the same instructions as the rest.
//
// This file is compiled once per instruction set, with BCE_KERNEL naming the table it defines.
// Everything else has internal linkage: the linker must not share a function between the sets.
#include "bce_cpu.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "bce_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jax_bce {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define BCE_X86(operation, ...)                  \
  if constexpr (sizeof(T) == 4)                  \
    return _mm512_##operation##_ps(__VA_ARGS__); \
  else                                           \
    return _mm512_##operation##_pd(__VA_ARGS__)
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#define BCE_X86(operation, ...)                  \
  if constexpr (sizeof(T) == 4)                  \
    return _mm256_##operation##_ps(__VA_ARGS__); \
  else                                           \
    return _mm256_##operation##_pd(__VA_ARGS__)
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kTile = 256;
// The lanes of a block's sum: as many as the widest vector has, in every instruction set, so that
// all of them add in the same order.
constexpr int kSumLanes = 16;

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class T>
struct Vector {
  using Scalar = T;
  using Float = typename VectorOf<T>::type;
  using Bits = typename VectorOf<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>::type;
  static constexpr int kLanes = kVectorBytes / sizeof(T);

  static BCE_INLINE Float set(Scalar value) { return Float{} + value; }
  static BCE_INLINE Bits to_bits(Float value) { return reinterpret_cast<Bits>(value); }
  static BCE_INLINE Float from_bits(Bits bits) { return reinterpret_cast<Float>(bits); }

  template <class Mask>
  static BCE_INLINE Float select(Mask mask, Float yes, Float no) {
    return mask ? yes : no;
  }

  // Every build of this file has these instructions. GCC does not find min and max in a comparison
  // and a selection, and no compiler may decide on its own where to round a product.
#if defined(BCE_X86)
  static BCE_INLINE Float min(Float a, Float b) { BCE_X86(min, a, b); }
  static BCE_INLINE Float max(Float a, Float b) { BCE_X86(max, a, b); }
  static BCE_INLINE Float fma(Float a, Float b, Float c) { BCE_X86(fmadd, a, b, c); }
#else
  static BCE_INLINE Float min(Float a, Float b) { return a < b ? a : b; }
  static BCE_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
  static BCE_INLINE Float fma(Float a, Float b, Float c) {
    if constexpr (sizeof(T) == 4)
      return vfmaq_f32(c, a, b);
    else
      return vfmaq_f64(c, a, b);
  }
#endif

  static BCE_INLINE Float load(const Scalar* from) {
    Float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static BCE_INLINE void store(Scalar* to, Float value) { std::memcpy(to, &value, sizeof value); }
};

// XLA's threads flush subnormal numbers to zero; a block needs them.
class GradualUnderflow {
 public:
#if defined(__x86_64__)
  GradualUnderflow() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~GradualUnderflow() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  GradualUnderflow() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~GradualUnderflow() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// The 16-bit formats, as bits.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
BCE_INLINE To convert(From value) {
  return static_cast<To>(value);
}
template <class To>
BCE_INLINE To convert(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &value.bits, sizeof half);
  return half;
#endif
}
template <class To>
BCE_INLINE To convert(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class To, class From>
BCE_INLINE void widen(const From* from, int size, To* to) {
  for (int i = 0; i < size; ++i) to[i] = convert<To>(from[i]);
}

// Rounding to nearest even; NaN stays NaN.
BCE_INLINE void narrow(float value, Float16* to) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = value;
  std::memcpy(&to->bits, &half, sizeof half);
#endif
}
BCE_INLINE void narrow(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}
BCE_INLINE void narrow(double value, float* to) { *to = static_cast<float>(value); }

template <class To, class From>
BCE_INLINE void narrow(const From* from, int size, To* to) {
  for (int i = 0; i < size; ++i) narrow(from[i], to + i);
}

#if defined(__F16C__)
// GCC 12 does not vectorize these two.
BCE_INLINE void widen(const Float16* from, int size, float* to) {
  int i = 0;
  for (; i + 8 <= size; i += 8) {
    __m128i halves;
    std::memcpy(&halves, from + i, sizeof halves);
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < size; ++i) to[i] = convert<float>(from[i]);
}
BCE_INLINE void narrow(const float* from, int size, Float16* to) {
  int i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to + i, &halves, sizeof halves);
  }
  for (; i < size; ++i) narrow(from[i], to + i);
}
#endif

// Calls f with a null pointer to the C++ type.
template <class F>
BCE_INLINE auto dispatch(Type type, F f) {
  switch (type) {
    case Type::kF16:
      return f(static_cast<Float16*>(nullptr));
    case Type::kBF16:
      return f(static_cast<BFloat16*>(nullptr));
    case Type::kF32:
      return f(static_cast<float*>(nullptr));
    case Type::kF64:
      return f(static_cast<double*>(nullptr));
    case Type::kI8:
      return f(static_cast<int8_t*>(nullptr));
    case Type::kBool:
    case Type::kU8:
      return f(static_cast<uint8_t*>(nullptr));
    case Type::kI16:
      return f(static_cast<int16_t*>(nullptr));
    case Type::kI32:
      return f(static_cast<int32_t*>(nullptr));
    case Type::kI64:
      break;
  }
  return f(static_cast<int64_t*>(nullptr));
}

template <class Scalar>
constexpr Type kTypeOf = sizeof(Scalar) == 4 ? Type::kF32 : Type::kF64;

// A row of an operand, from element `begin` on.
template <class Scalar>
struct Stream {
  const Operand& operand;
  int64_t stride;  // 0 or 1
  int64_t start;

  Stream(const Problem& problem, const Operand& operand, int64_t row, int64_t begin)
      : operand(operand),
        stride(operand.strides[problem.rank - 1]),
        start(problem.row_start(operand, row) + begin * stride) {}

  // The next `size` elements in the arithmetic's type: in place if they lie there and fill a tile,
  // else in the buffer, padded to whole vectors.
  const Scalar* load(int64_t done, int size, Scalar padding, Scalar* buffer) const {
    return dispatch(operand.type, [&](auto* type) -> const Scalar* {
      using Stored = std::remove_pointer_t<decltype(type)>;
      const Stored* from = static_cast<const Stored*>(operand.data) + start + done * stride;
      if constexpr (std::is_same_v<Stored, Scalar>) {
        if (stride == 1 && size == kTile) return from;
      }
      if (stride == 1) {
        widen(from, size, buffer);
      } else {
        const Scalar value = convert<Scalar>(*from);
        for (int i = 0; i < size; ++i) buffer[i] = value;
      }
      for (int i = size; i % kSumLanes; ++i) buffer[i] = padding;
      return buffer;
    });
  }
};

// Where a tile's results go before store(): in place if the tile is full and of the right type.
template <class Scalar>
Scalar* target(const Result& result, int64_t offset, int size, Scalar* buffer) {
  const bool in_place = result.type == kTypeOf<Scalar> && size == kTile;
  return in_place ? static_cast<Scalar*>(result.data) + offset : buffer;
}

template <class Scalar>
void store(const Result& result, int64_t offset, int size, const Scalar* from) {
  dispatch(result.type, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    Stored* to = static_cast<Stored*>(result.data) + offset;
    if constexpr (std::is_same_v<Stored, Scalar>) {
      if (to != from) std::memcpy(to, from, size * sizeof(Scalar));
    } else if constexpr (sizeof(Stored) < sizeof(Scalar) && !std::is_integral_v<Stored>) {
      narrow(from, size, to);
    }
  });
}

// A block's sum: float64 lanes for the rounded losses, the arithmetic's type for what rounding
// lost.
template <class Scalar>
struct Sum {
  using V = Vector<Scalar>;
  using Wide = typename VectorOf<double>::type;
  static constexpr int kWideLanes = kVectorBytes / sizeof(double);
  Wide sums[kSumLanes / kWideLanes] = {};
  typename V::Float lows[kSumLanes / V::kLanes] = {};

  BCE_INLINE void add(int vector, const Element<V>& element) {
    if constexpr (sizeof(Scalar) == sizeof(double)) {
      sums[vector] += element.loss;
    } else {
      typename VectorOf<float, kVectorBytes / 2>::type halves[2];
      std::memcpy(halves, &element.loss, sizeof halves);
      sums[2 * vector] += __builtin_convertvector(halves[0], Wide);
      sums[2 * vector + 1] += __builtin_convertvector(halves[1], Wide);
    }
    lows[vector] += element.loss_low;
  }

  double total() const {
    double total = 0;
    for (int i = 0; i < kSumLanes; ++i) {
      const double sum = sums[i / kWideLanes][i % kWideLanes];
      // What the rounding of an infinite loss lost is not a number.
      total += std::isfinite(sum) ? sum + lows[i / V::kLanes][i % V::kLanes] : sum;
    }
    return total;
  }
};

template <class Scalar, bool kReduce, bool kLoss, bool kGradient>
double block(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  using V = Vector<Scalar>;
  alignas(64) Scalar logits_buffer[kTile], labels_buffer[kTile], factors[kTile];
  alignas(64) Scalar loss_buffer[kTile], gradient_buffer[kTile];
  alignas(64) Scalar e[kTile], e_low[kTile], e_scale[kTile];
  const GradualUnderflow mode;
  const Stream<Scalar> logits_stream(problem, problem.logits, row, begin);
  const Stream<Scalar> labels_stream(problem, problem.labels, row, begin);
  const Stream<Scalar> scale_stream(problem, problem.scale, row, begin);
  const int64_t result_start = row * problem.columns() + begin;
  // For bfloat16, with fewer digits than half of float32's, this would change nothing for labels 0
  // and 1: their results are rounded as if once, all of them (the exhaustive run).
  const bool odd_loss = problem.loss.type == Type::kF16;
  const bool odd_gradient = problem.gradient.type == Type::kF16;
  Sum<Scalar> sum;
  for (int64_t done = 0; done < size; done += kTile) {
    const int tile = static_cast<int>(size - done < kTile ? size - done : kTile);
    // A padding element has logit -inf and label 0: its loss is exactly 0.
    const Scalar* logits =
        logits_stream.load(done, tile, -std::numeric_limits<Scalar>::infinity(), logits_buffer);
    const Scalar* labels = labels_stream.load(done, tile, 0, labels_buffer);
    if (done == 0 || scale_stream.stride) {
      const Scalar* scale = scale_stream.load(done, tile, 0, factors);
      for (int i = 0; i < tile; ++i) factors[i] = static_cast<double>(scale[i]) / problem.count;
    }
    Scalar* loss = target(problem.loss, result_start + done, tile, loss_buffer);
    Scalar* gradient = target(problem.gradient, result_start + done, tile, gradient_buffer);
    for (int i = 0; i < tile; i += V::kLanes) {
      const Exponential<V> exponential = exp_of<V>(V::load(logits + i));
      V::store(e + i, exponential.e);
      V::store(e_low + i, exponential.e_low);
      V::store(e_scale + i, exponential.scale);
    }
    for (int i = 0; i < tile; i += kSumLanes) {
#pragma GCC unroll 8
      for (int v = 0; v < kSumLanes / V::kLanes; ++v) {
        const int j = i + v * V::kLanes;
        const Exponential<V> exponential = {V::load(e + j), V::load(e_low + j),
                                            V::load(e_scale + j)};
        const Element<V> element =
            binary_cross_entropy<V>(V::load(logits + j), V::load(labels + j), exponential);
        const auto factor = V::load(factors + j);
        if constexpr (kReduce && kLoss) sum.add(v, element);
        if constexpr (!kReduce && kLoss) {
          const auto value =
              odd_loss ? round_to_odd<V>(element.loss, element.loss_low) : element.loss;
          V::store(loss + j, value * factor);
        }
        if constexpr (kGradient) {
          const auto value = odd_gradient ? round_to_odd<V>(element.gradient, element.gradient_low)
                                          : element.gradient;
          V::store(gradient + j, value * factor);
        }
      }
    }
    if constexpr (!kReduce && kLoss) store(problem.loss, result_start + done, tile, loss);
    if constexpr (kGradient) store(problem.gradient, result_start + done, tile, gradient);
  }
  return kReduce && kLoss ? sum.total() : 0;
}

template <class Scalar>
double block_of(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  const bool loss = problem.loss.data, gradient = problem.gradient.data;
  if (!loss) return block<Scalar, false, false, true>(problem, row, begin, size);
  if (problem.reduce) {
    return gradient ? block<Scalar, true, true, true>(problem, row, begin, size)
                    : block<Scalar, true, true, false>(problem, row, begin, size);
  }
  return gradient ? block<Scalar, false, true, true>(problem, row, begin, size)
                  : block<Scalar, false, true, false>(problem, row, begin, size);
}

double block_of_any(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  const bool wide = problem.scale.type == Type::kF64;
  return (wide ? block_of<double> : block_of<float>)(problem, row, begin, size);
}

}  // namespace

const CpuKernel BCE_KERNEL = {BCE_INSTRUCTION_SET, block_of_any};

}  // namespace jax_bce
