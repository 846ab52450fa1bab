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

// As many numbers as a vector of float64 holds. (GCC 12 converts vectors half by half.)
BCE_INLINE Vector<double>::Float load_wide(const double* from) {
  return Vector<double>::load(from);
}
BCE_INLINE Vector<double>::Float load_wide(const float* from) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  return Vector<double>::Float{from[0], from[1]};
#endif
}

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

// Some elements of a row on their way through the two steps of the formula.
template <class Scalar>
struct Tile {
  int size;  // whole groups of kSumLanes; so a tail is padded
  const Scalar *logits, *labels;
  Scalar *loss, *gradient;
  alignas(64) Scalar factors[kTile], loss_low[kTile], e[kTile], e_low[kTile], e_scale[kTile];
};

// A block's sum, in float64. What an element's loss.high lacks is small enough to be added up in
// the arithmetic's type over a tile.
template <class Scalar>
struct Sum {
  using V = Vector<Scalar>;
  using Wide = Vector<double>;
  typename Wide::Float lanes[kSumLanes / Wide::kLanes] = {};

  BCE_INLINE void add(const Tile<Scalar>& tile) {
    Sum sum = *this;
    typename V::Float low[kSumLanes / V::kLanes] = {};
    for (int i = 0; i < tile.size; i += kSumLanes) {
      sum.add(tile.loss + i);
      BCE_UNROLL
      for (int v = 0; v < kSumLanes / V::kLanes; ++v)
        low[v] += V::load(tile.loss_low + i + v * V::kLanes);
    }
    Scalar low_lanes[kSumLanes];
    std::memcpy(low_lanes, low, sizeof low);
    sum.add(low_lanes);
    *this = sum;
  }

  BCE_INLINE void add(const Scalar* values) {
    BCE_UNROLL
    for (int v = 0; v < kSumLanes / Wide::kLanes; ++v)
      lanes[v] += load_wide(values + v * Wide::kLanes);
  }

  double total() const {
    double total = 0;
    for (int i = 0; i < kSumLanes; ++i) total += lanes[i / Wide::kLanes][i % Wide::kLanes];
    return total;
  }
};

// Calls f with the index of every vector of the tile. In straight lines of several vectors, which
// do not wait for each other, the compiler finds more to do at once.
template <class V, class F>
BCE_INLINE void for_each_vector(int size, F f) {
  for (int i = 0; i < size; i += kSumLanes) {
    BCE_UNROLL
    for (int v = 0; v < kSumLanes / V::kLanes; ++v) f(i + v * V::kLanes);
  }
}

// The first step. Returns whether all elements are common, which it takes for granted if kCommon.
template <bool kCommon, class Scalar>
BCE_INLINE bool exponentials(Tile<Scalar>& tile) {
  using V = Vector<Scalar>;
  using Bits = typename V::Bits;
  const Scalar *logits = tile.logits, *labels = tile.labels;
  Bits largest = {}, soft = {};
  for_each_vector<V>(tile.size, [&](int i) {
    const auto logit = V::load(logits + i), label = V::load(labels + i);
    const Exponential<V> exponential = exp_of<V, kCommon>(logit);
    V::store(tile.e + i, exponential.e);
    V::store(tile.e_low + i, exponential.e_low);
    if constexpr (!kCommon) V::store(tile.e_scale + i, exponential.scale);
    // Magnitudes are in the order of their bits, with infinity and NaN at the end.
    const Bits magnitude = V::to_bits(magnitude_of<V>(logit));
    largest = magnitude > largest ? magnitude : largest;
    soft |= V::to_bits(V::fma(label, label, -label));
  });
  const Bits limit = V::to_bits(V::set(Format<Scalar>::kCommon));
  bool common = true;
  for (int i = 0; i < V::kLanes; ++i) common &= largest[i] <= limit[i] && soft[i] == 0;
  return common;
}

// The second step: the loss, the gradient, or both.
template <bool kCommon, bool kReduce, bool kLoss, bool kGradient, class Scalar>
BCE_INLINE void elements(Tile<Scalar>& tile, Type loss_type, Type gradient_type) {
  using V = Vector<Scalar>;
  const Scalar *logits = tile.logits, *labels = tile.labels;
  Scalar *loss = tile.loss, *gradient = tile.gradient;
  for_each_vector<V>(tile.size, [&](int i) {
    const auto logit = V::load(logits + i), label = V::load(labels + i);
    const auto factor = V::load(tile.factors + i);
    const Exponential<V> exponential = {V::load(tile.e + i), V::load(tile.e_low + i),
                                        V::load(tile.e_scale + i)};
    const auto write = [&](Scalar* to, Pair<typename V::Float> value, Type type) {
      value = fast_two_sum(value.high, value.low);
      // For bfloat16, with fewer digits than half of float32's, this would change nothing for
      // labels 0 and 1: their results are rounded as if once, all of them (the exhaustive run).
      if (type == Type::kF16) value.high = round_to_odd<V>(value.high, value.low);
      V::store(to + i, value.high * factor);
    };
    if constexpr (kLoss) {
      const auto value = loss_of<V, kCommon>(logit, label, exponential);
      if constexpr (kReduce) {
        V::store(loss + i, value.high);
        V::store(tile.loss_low + i, value.low);
      } else {
        write(loss, value, loss_type);
      }
    }
    if constexpr (kGradient)
      write(gradient, gradient_of<V, kCommon>(logit, label, exponential), gradient_type);
  });
}

template <class Scalar, bool kReduce, bool kLoss, bool kGradient>
double block(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  const GradualUnderflow mode;
  Tile<Scalar> tile;
  alignas(64) Scalar logits[kTile], labels[kTile], loss[kTile], gradient[kTile];
  const Stream<Scalar> logits_stream(problem, problem.logits, row, begin);
  const Stream<Scalar> labels_stream(problem, problem.labels, row, begin);
  const Stream<Scalar> scale_stream(problem, problem.scale, row, begin);
  const int64_t result_start = row * problem.columns() + begin;
  Sum<Scalar> sum;
  for (int64_t done = 0; done < size; done += kTile) {
    const int filled = static_cast<int>(size - done < kTile ? size - done : kTile);
    tile.size = (filled + kSumLanes - 1) / kSumLanes * kSumLanes;
    // A padding element has logit -inf and label 0: its loss is exactly 0.
    tile.logits =
        logits_stream.load(done, filled, -std::numeric_limits<Scalar>::infinity(), logits);
    tile.labels = labels_stream.load(done, filled, 0, labels);
    if (done == 0 || scale_stream.stride) {
      const Scalar* scale = scale_stream.load(done, filled, 0, tile.factors);
      for (int i = 0; i < filled; ++i)
        tile.factors[i] = static_cast<double>(scale[i]) / problem.count;
    }
    const int64_t offset = result_start + done;
    tile.loss = kReduce ? loss : target(problem.loss, offset, filled, loss);
    tile.gradient = target(problem.gradient, offset, filled, gradient);
    if (exponentials<true>(tile)) {
      elements<true, kReduce, kLoss, kGradient>(tile, problem.loss.type, problem.gradient.type);
    } else {
      exponentials<false>(tile);
      elements<false, kReduce, kLoss, kGradient>(tile, problem.loss.type, problem.gradient.type);
    }
    if constexpr (kLoss && kReduce) sum.add(tile);
    if constexpr (kLoss && !kReduce) store(problem.loss, offset, filled, tile.loss);
    if constexpr (kGradient) store(problem.gradient, offset, filled, tile.gradient);
  }
  return sum.total();
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
