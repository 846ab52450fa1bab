// The CPU loop. A block of a row is evaluated tile by tile: an operand that is not stored in the
// arithmetic's type, is broadcast, or ends inside a tile goes through a buffer in the first-level
// cache. So the arithmetic is compiled once per scalar type instead of once per pair of dtypes, and
// a tail is computed by the same instructions as the rest.
//
// Each type of arithmetic has a source file, which is compiled once per instruction set. Everything
// here has internal linkage: the linker must not share a function between the sets.
#pragma once

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "bce_cpu.h"
#include "bce_focal.h"

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

// What eight threads add up in the order of bce_problem.h, in so many lanes.
constexpr int kTile = 256, kTileThreads = 8, kSumLanes = kTileThreads * kQuad;
// Up to here, it is faster to evaluate several rows at once.
constexpr int kShortRow = 96;

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

  // Whether a bit is set in any lane.
  static BCE_INLINE bool any(Bits bits) {
    uint64_t words[kVectorBytes / 8], all = 0;
    std::memcpy(words, &bits, sizeof bits);
    for (uint64_t word : words) all |= word;
    return all != 0;
  }

  static BCE_INLINE Float divide(Float a, Float b) { return a / b; }
  static BCE_INLINE Float ratio(Float a, Float b) { return a / b; }
  static BCE_INLINE Float magnitude(Float value) { return from_bits(to_bits(value) << 1 >> 1); }

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

// XLA's threads flush subnormal numbers to zero; results may be such.
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

// The elements of a tile: columns [column, column + columns) of `rows` rows, whole ones if several.
struct Span {
  int64_t row, column;
  int rows, columns;

  int size() const { return rows * columns; }
};

// Those of its rows that follow each other in the last dimension of rows.
struct Segment {
  int rows;
  RowStart start;  // of its first row
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
      std::memcpy(to, from, size * sizeof(Scalar));
    } else if constexpr (std::is_same_v<Stored, Float16> || std::is_same_v<Stored, BFloat16>) {
      if constexpr (std::is_same_v<Scalar, float>) narrow(from, size, to);
    }
  });
}

// Elements [element, element + size) of a modifier in the type To: in place if they lie there in
// one piece and fill a tile, else in the buffer. `constant`: whether they are one number.
template <class To>
const To* load(const Modifier& modifier, int64_t element, int size, To* buffer, bool* constant) {
  const int last = modifier.rank - 1;
  const int64_t inner = modifier.shape[last], stride = modifier.strides[last];
  int64_t outer = element / inner, position = element - outer * inner;
  const bool whole = position + size <= inner;
  *constant = whole && stride == 0;
  return dispatch(modifier.type, [&](auto* type) -> const To* {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const Stored* data = static_cast<const Stored*>(modifier.data);
    if constexpr (std::is_same_v<Stored, To>) {
      if (whole && stride == 1 && size == kTile) return data + modifier.offset(element);
    }
    for (int i = size; i % kSumLanes; ++i) buffer[i] = 0;
    for (int done = 0; done < size; ++outer, position = 0) {
      const int64_t rest = inner - position;
      const int run = rest < size - done ? static_cast<int>(rest) : size - done;
      const Stored* from = data + position * stride;
      from += last > 1   ? modifier.offset(outer * inner)
              : last > 0 ? outer * modifier.strides[0]
                         : 0;
      if (stride == 1) {
        widen(from, run, buffer + done);
      } else {
        const To value = convert<To>(*from);
        for (int i = 0; i < run; ++i) buffer[done + i] = value;
      }
      done += run;
    }
    return buffer;
  });
}

// Some elements of a row on their way through the two steps of the formula.
template <class Scalar>
struct Tile {
  int size;  // whole groups of kSumLanes; so a tail is padded
  const Scalar *logits, *labels;
  Scalar *loss, *gradient;
  bool smoothed;
  bool narrow;  // whether the losses are narrow_elements()' without weights
  alignas(64) Scalar factors[kTile], smoothing[kTile];
  // Of a focal loss. alpha and clip are null if they are not given; without a gamma_pos, it is
  // gamma.
  const Scalar *alpha, *gamma, *gamma_pos, *clip, *clip_logit, *clip_logit_low;
  bool products;  // whether all elements have the same gammas, which are 0, 1, 2 or 4, and which
  int integer_neg, integer_pos;
  const Scalar* hess_floor = nullptr;
  const Scalar* pos_weight;  // this and the next are of a modified problem
  alignas(64) Scalar weight[kTile], weight_low[kTile];
  alignas(64) Scalar loss_low[kTile], e[kTile], e_low[kTile], e_scale[kTile];
};

// Folds 32 numbers by halves, and overwrites them.
double fold(double* numbers) {
  for (int half = kFold / 2; half > 0; half /= 2)
    for (int t = 0; t < half; ++t) numbers[t] += numbers[t + half];
  return numbers[0];
}

// Adds up the elements of eight threads, a tile, to their eight numbers.
template <class Scalar>
BCE_INLINE void sum_threads(const Tile<Scalar>& tile, double* threads) {
  using V = Vector<Scalar>;
  using Wide = Vector<double>;
  typename Wide::Float high[kSumLanes / Wide::kLanes] = {};
  typename V::Float low[kSumLanes / V::kLanes] = {};
  for (int i = 0; i < tile.size; i += kSumLanes) {
    BCE_UNROLL
    for (int v = 0; v < kSumLanes / Wide::kLanes; ++v)
      high[v] += load_wide(tile.loss + i + v * Wide::kLanes);
    BCE_UNROLL
    for (int v = 0; v < kSumLanes / V::kLanes; ++v)
      low[v] += V::load(tile.loss_low + i + v * V::kLanes);
  }
  Scalar low_lanes[kSumLanes];
  std::memcpy(low_lanes, low, sizeof low);
  double lanes[kSumLanes];
  BCE_UNROLL
  for (int v = 0; v < kSumLanes / Wide::kLanes; ++v)
    Wide::store(lanes + v * Wide::kLanes, high[v] + load_wide(low_lanes + v * Wide::kLanes));
  for (int t = 0; t < kTileThreads; ++t) {
    const double* lane = lanes + t * kQuad;
    threads[t] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
}

// The same for results of narrow_elements() without weights, which are at most 8 x 44: a lane's sum
// is in float32.
BCE_INLINE void sum_narrow_threads(const Tile<float>& tile, double* threads) {
  using V = Vector<float>;
  typename V::Float sums[kSumLanes / V::kLanes] = {};
  for (int i = 0; i < tile.size; i += kSumLanes) {
    BCE_UNROLL
    for (int v = 0; v < kSumLanes / V::kLanes; ++v)
      sums[v] += V::load(tile.loss + i + v * V::kLanes);
  }
  float lanes[kSumLanes];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int t = 0; t < kTileThreads; ++t) {
    const float* lane = lanes + t * kQuad;
    threads[t] = (double{lane[0]} + lane[2]) + (double{lane[1]} + lane[3]);
  }
}

template <class Scalar>
BCE_INLINE void sum_tile(const Tile<Scalar>& tile, double* threads) {
  if constexpr (sizeof(Scalar) == 4)
    if (tile.narrow) return sum_narrow_threads(tile, threads);
  sum_threads(tile, threads);
}

// Calls f with the index of every vector of the tile. In straight lines of several vectors, which
// do not wait for each other, the compiler finds more to do at once.
template <class V, class F>
BCE_INLINE void for_each_vector(int size, F f) {
  for (int i = 0; i < size; i += kSumLanes) {
    BCE_UNROLL
    for (int v = 0; v < kSumLanes / V::kLanes; ++v) f(i + v * V::kLanes);
  }
}

// Whether all logits of a tile are common, and whether all labels are 0 or 1.
struct Found {
  bool common, hard;
};

// Finds out, from one vector after the other.
template <class V>
class Search {
 public:
  BCE_INLINE void see(typename V::Float logit, typename V::Float label) {
    // Magnitudes are in the order of their bits, with infinity and NaN at the end.
    const Bits magnitude = V::to_bits(V::magnitude(logit));
    largest_ = magnitude > largest_ ? magnitude : largest_;
    soft_ |= V::to_bits(V::fma(label, label, -label));
  }

  BCE_INLINE Found found(bool smoothed) const {
    const Bits limit = V::to_bits(V::set(Format<typename V::Scalar>::kCommon));
    return {!V::any(reinterpret_cast<Bits>(largest_ > limit)), !smoothed && !V::any(soft_)};
  }

 private:
  using Bits = typename V::Bits;
  Bits largest_ = {}, soft_ = {};
};

// value * turn, where turn is turn_of a label of 0 or 1: cheaper by its sign.
template <class V>
BCE_INLINE typename V::Float turned(typename V::Float value, typename V::Float turn) {
  return V::from_bits(V::to_bits(value) ^ sign_of<V>(turn));
}

// The first step. If kCommon, it takes for granted that all logits are common.
template <bool kCommon, bool kPrecise = false, class Scalar>
BCE_INLINE Found exponentials(Tile<Scalar>& tile) {
  using V = Vector<Scalar>;
  const Scalar *logits = tile.logits, *labels = tile.labels;
  Search<V> search;
  for_each_vector<V>(tile.size, [&](int i) {
    const auto logit = V::load(logits + i);
    const Exponential<V> exponential = exp_of<V, kCommon, kPrecise>(logit);
    V::store(tile.e + i, exponential.e);
    V::store(tile.e_low + i, exponential.e_low);
    if constexpr (!kCommon) V::store(tile.e_scale + i, exponential.scale);
    search.see(logit, V::load(labels + i));
  });
  return search.found(tile.smoothed);
}

// What the modifiers of a tile come to: no element exists; nothing; some do not exist; a weight
// that is one number, or that of a label; or anything.
enum class Modified { kDropped, kNot, kMasked, kExact, kAny };
template <Modified kModified>
using Constant = std::integral_constant<Modified, kModified>;

// The second step: the loss, the gradient, or both. If kHessian, a loss is a second derivative.
template <bool kCommon, Modified kModified, bool kReduce, bool kLoss, bool kGradient, bool kHessian,
          class Scalar>
BCE_INLINE void elements(Tile<Scalar>& tile, Type loss_type, Type gradient_type) {
  using V = Vector<Scalar>;
  const Scalar *logits = tile.logits, *labels = tile.labels;
  Scalar *loss = tile.loss, *gradient = tile.gradient;
  for_each_vector<V>(tile.size, [&](int i) {
    const auto logit = V::load(logits + i), label = V::load(labels + i);
    const auto factor = V::load(tile.factors + i);
    typename V::Float smoothing = {};
    if constexpr (!kCommon) smoothing = V::load(tile.smoothing + i);
    Weight<typename V::Float> weight = {};
    constexpr bool kAny = kModified == Modified::kAny;
    if constexpr (kModified == Modified::kExact) {
      static_assert(kCommon);  // labels are 0 or 1
      const auto one = V::set(1);
      weight.weight.high = V::load(tile.weight + i);
      weight.weight.high *= V::select(label == one, V::load(tile.pos_weight + i), one);
    } else if constexpr (kModified == Modified::kMasked) {
      weight.weight.high = V::load(tile.weight + i);
    } else if constexpr (kAny) {
      weight = weight_of<V>({V::load(tile.weight + i), V::load(tile.weight_low + i)},
                            V::load(tile.pos_weight + i), label, smoothing);
    }
    const Exponential<V> exponential = {V::load(tile.e + i), V::load(tile.e_low + i),
                                        V::load(tile.e_scale + i)};
    const auto turn = turn_of<V>(label), z = turned<V>(logit, turn);  // if kCommon
    const auto kept = [&](typename V::Float value) {
      return V::select(weight.weight.high == V::set(0), V::set(0), value);
    };
    const auto write = [&](Scalar* to, Pair<typename V::Float> value, typename V::Float own_weight,
                           Type type, bool turns) {
      value = fast_two_sum(value.high, value.low);
      // For bfloat16, with fewer digits than half of float32's, this would change nothing for
      // labels 0 and 1: their results are rounded as if once, all of them (the exhaustive run).
      if (type == Type::kF16) value.high = round_to_odd<V>(value.high, value.low);
      if constexpr (kModified == Modified::kMasked)
        value.high = kept(value.high);
      else if constexpr (kModified != Modified::kNot)
        value.high = weighted<V, kCommon>({value.high, V::set(0)}, own_weight).high;
      value.high *= factor;
      V::store(to + i, turns ? turned<V>(value.high, turn) : value.high);
    };
    if constexpr (kHessian) {
      // The floor comes after pos_weight and before the other weights.
      constexpr bool kPositive = kAny || kModified == Modified::kExact;
      const auto floor = V::load(tile.hess_floor + i);
      typename V::Float pos_weight = {}, rest = {};
      if constexpr (kPositive) pos_weight = V::load(tile.pos_weight + i);
      if constexpr (kModified != Modified::kNot) rest = V::load(tile.weight + i);
      const auto value = hessian_of<V, kCommon, kPositive>(logit, label, smoothing, exponential,
                                                           floor, pos_weight);
      write(loss, value, rest, loss_type, false);
    } else if constexpr (kLoss) {
      auto value = [&] {
        if constexpr (kCommon)
          return turned_loss_of<V>(z, exponential);
        else
          return loss_of<V, false, kAny>(logit, label, smoothing, exponential, weight.pos_weight);
      }();
      if constexpr (kReduce) {
        if constexpr (kModified == Modified::kMasked)
          value = {kept(value.high), kept(value.low)};
        else if constexpr (kModified == Modified::kExact)
          value = weighted<V, true>(value, weight.weight.high);
        else if constexpr (kAny)
          value = weighted<V, kCommon>(value, weight.weight);
        V::store(loss + i, value.high);
        V::store(tile.loss_low + i, value.low);
      } else {
        write(loss, value, weight.weight.high, loss_type, false);
      }
    }
    if constexpr (kGradient && kCommon)
      write(gradient, turned_gradient_of<V>(z, exponential), weight.weight.high, gradient_type,
            true);
    else if constexpr (kGradient)
      write(gradient,
            gradient_of<V, false, kAny>(logit, label, smoothing, exponential, weight.pos_weight),
            weight.weight.high, gradient_type, false);
  });
}

// Both steps for 16-bit logits: without pairs, they are short. Takes for granted that all elements
// are common.
template <Modified kModified, bool kReduce, bool kLoss, bool kGradient, bool kHessian>
BCE_INLINE Found narrow_elements(const Tile<float>& tile, float* loss, float* gradient) {
  using V = Vector<float>;
  Search<V> search;
  for_each_vector<V>(tile.size, [&](int i) {
    const auto logit = V::load(tile.logits + i), label = V::load(tile.labels + i);
    search.see(logit, label);
    const auto e = short_exp_of<V>(logit);
    const auto turn = turn_of<V>(label), z = turned<V>(logit, turn);
    const auto factor = V::load(tile.factors + i);
    const auto with_weight = [&](V::Float value) {
      if constexpr (kModified != Modified::kNot) value *= V::load(tile.weight + i);
      return value;
    };
    const auto with_pos_weight = [&](V::Float value) {
      if constexpr (kModified == Modified::kExact)
        value *= V::select(label == V::set(1), V::load(tile.pos_weight + i), V::set(1));
      return value;
    };
    const auto weighted = [&](V::Float value) { return with_pos_weight(with_weight(value)); };
    if constexpr (kHessian) {
      const auto hessian = hard_hessian_of<V>(z, e, hard_gradient_of<V>(z, e, V::set(1) + e));
      const auto floor = V::load(tile.hess_floor + i);
      V::store(loss + i, with_weight(floored<V>(with_pos_weight(hessian), floor)) * factor);
    } else if constexpr (kLoss) {
      const auto value = weighted(V::fma(V::set(2), half_log1p_of<V>(e), V::max(z, V::set(0))));
      V::store(loss + i, kReduce ? value : value * factor);
    }
    if constexpr (kGradient) {
      const auto value = weighted(hard_gradient_of<V>(z, e, V::set(1) + e));
      V::store(gradient + i, turned<V>(value * factor, turn));
    }
  });
  return search.found(tile.smoothed);
}

// The second step of a focal loss, which is longer and therefore several, for all kinds of results.
template <bool kCommon, bool kClips, bool kProducts, class Scalar>
[[gnu::noinline]] void focal_elements(Tile<Scalar>& tile, const Problem& problem, bool weighs) {
  using V = Vector<Scalar>;
  using Float = typename V::Float;
  const auto at = [](const Scalar* numbers, int i) { return V::load(numbers + i * V::kLanes); };
  const auto exponential = [&](int i) -> Exponential<V> {
    const auto scale = kCommon ? V::set(1) : at(tile.e_scale, i);
    return {at(tile.e, i), at(tile.e_low, i), scale};
  };
  const auto focus = [&](int i) -> Focus<Float> {
    Focus<Float> focus = {
        at(tile.gamma, i), at(tile.gamma_pos, i), V::set(0),       V::set(-0x1p100),
        V::set(0),         tile.integer_neg,      tile.integer_pos};
    if constexpr (kClips) {
      focus.clip = at(tile.clip, i);
      focus.clip_logit = at(tile.clip_logit, i);
      focus.clip_logit_low = at(tile.clip_logit_low, i);
    }
    return focus;
  };
  const int vectors = (tile.size + V::kLanes - 1) / V::kLanes;
  HardFocal<V, kClips, kProducts> elements[kTile / V::kLanes];
  for (int i = 0; i < vectors; ++i)
    elements[i].probabilities(at(tile.logits, i), at(tile.labels, i), exponential(i));
  for (int i = 0; kClips && i < vectors; ++i) elements[i].clip(at(tile.labels, i), focus(i));
  for (int i = 0; i < vectors; ++i) elements[i].logarithms(exponential(i));

  const bool with_loss = problem.loss.data, with_gradient = problem.gradient.data;
  const bool has_weight = weighs || tile.alpha;
  for (int i = 0; i < vectors; ++i) {
    const Float label = at(tile.labels, i), smoothing = kCommon ? V::set(0) : at(tile.smoothing, i);
    auto result = elements[i].result(label, focus(i), problem.constant_power);
    if constexpr (!kCommon) {
      const Float logit = at(tile.logits, i);
      const auto hard = is_hard<V>(logit, label, smoothing);
      const auto soft = soft_focal_of<V>(logit, label, smoothing, exponential(i), focus(i),
                                         problem.constant_power);
      result = {{V::select(hard, result.loss.high, soft.loss.high),
                 V::select(hard, result.loss.low, soft.loss.low)},
                V::select(hard, result.gradient, soft.gradient)};
    }
    Pair<Float> weight = {V::set(1), V::set(0)};
    if (weighs) weight = {at(tile.weight, i), at(tile.weight_low, i)};
    if (tile.alpha)
      weight = product_of<V>(weight, balance_of<V>(at(tile.alpha, i), label, smoothing));
    const auto write = [&](Scalar* to, Float value) {
      if (has_weight) value = weighted<V, kCommon>({value, V::set(0)}, weight.high).high;
      V::store(to + i * V::kLanes, value * at(tile.factors, i));
    };
    if (with_loss && problem.reduce) {
      const auto value = has_weight ? weighted<V, kCommon>(result.loss, weight) : result.loss;
      V::store(tile.loss + i * V::kLanes, value.high);
      V::store(tile.loss_low + i * V::kLanes, value.low);
    } else if (with_loss) {
      auto loss = fast_two_sum(result.loss.high, result.loss.low);
      if (problem.loss.type == Type::kF16) loss.high = round_to_odd<V>(loss.high, loss.low);
      write(tile.loss, loss.high);
    }
    if (with_gradient) write(tile.gradient, result.gradient);
  }
}

template <bool kCommon, class Scalar>
void focal_elements(Tile<Scalar>& tile, const Problem& problem, bool weighs) {
  const auto evaluate = [&](auto clips) {
    if (kCommon && tile.products)
      focal_elements<kCommon, clips, kCommon>(tile, problem, weighs);
    else
      focal_elements<kCommon, clips, false>(tile, problem, weighs);
  };
  tile.clip ? evaluate(std::true_type()) : evaluate(std::false_type());
}

// The logits of a tile of probabilities, in two parts.
template <class Scalar>
[[gnu::noinline]] void logits_of(const Scalar* probabilities, int size, Scalar* high, Scalar* low) {
  using V = Vector<double>;
  double p[kTile];
  for (int i = 0; i < size; ++i) p[i] = probabilities[i];
  for (int i = 0; i < size; i += V::kLanes) {
    const auto logit = logit_of<V>(V::load(p + i));
    for (int k = 0; k < V::kLanes; ++k) {
      const bool none = p[i + k] == 0;
      high[i + k] = none ? Scalar(-0x1p100) : static_cast<Scalar>(logit.high[k]);
      low[i + k] = none ? 0 : static_cast<Scalar>(logit.high[k] - high[i + k] + logit.low[k]);
    }
  }
}

// A tile of positive weights where there are none.
template <class Scalar>
const Scalar* ones() {
  struct Ones {
    alignas(64) Scalar numbers[kTile];
    constexpr Ones() : numbers() {
      for (Scalar& number : numbers) number = 1;
    }
  };
  static constexpr Ones kOnes;
  return kOnes.numbers;
}

BCE_INLINE void finish_row(const Problem& problem, int64_t row, double loss) {
  if (problem.loss.type == Type::kF64)
    static_cast<double*>(problem.loss.data)[row] = loss;
  else
    static_cast<float*>(problem.loss.data)[row] = static_cast<float>(loss);
}

// The operands of a problem, loaded tile by tile. It does not depend on what is computed of them,
// so that it is compiled once for each type of the arithmetic.
template <class Scalar>
class Inputs {
 protected:
  explicit Inputs(const Problem& problem) : problem_(problem), last_(problem.rank - 1) {
    const auto one_for_all = [&](const Operand& operand) {
      for (int d = 0; d < problem.rank; ++d)
        if (operand.strides[d] != 0) return false;
      return true;
    };
    // Of which all rows, or all elements of one, have the same.
    one_for_all_ = one_for_row_ = true;
    for (const Operand* operand :
         {&problem.scale, &problem.smoothing, &problem.divisor, &problem.divisor_low}) {
      one_for_all_ &= one_for_all(*operand);
      one_for_row_ &= operand->strides[last_] == 0;
    }
  }

  // Makes it the tile of these elements.
  BCE_INLINE void begin(const Span& span) {
    const int filled = span.size();
    tile_.size = (filled + kSumLanes - 1) / kSumLanes * kSumLanes;
    const bool same_row = span.rows == 1 && located_.rows == 1 && span.row == located_.row;
    if (!same_row) locate(span);
    if (!loaded_ || (!one_for_all_ && !(same_row && one_for_row_))) load_factors(span);
    located_ = span;
    masked_ = tile_.narrow = false;
  }

  void locate(const Span& span) {
    segments_ = 0;
    const int64_t together = last_ > 0 ? problem_.shape[last_ - 1] : 1;
    for (int done = 0; done < span.rows;) {
      const int64_t row = span.row + done, rest = together - row % together;
      const int rows = rest < span.rows - done ? static_cast<int>(rest) : span.rows - done;
      segment_[segments_++] = {rows, problem_.row_start(row)};
      done += rows;
    }
  }

  // Calls f with the place of every element of the tile in an operand.
  template <class F>
  BCE_INLINE void for_each_place(const Operand& operand, int64_t RowStart::* start,
                                 const Span& span, F f) const {
    const int64_t stride = operand.strides[last_];
    const int64_t row_stride = last_ > 0 ? operand.strides[last_ - 1] : 0;
    int i = 0;
    for (int s = 0; s < segments_; ++s) {
      int64_t place = segment_[s].start.*start + span.column * stride;
      for (int row = 0; row < segment_[s].rows; ++row, place += row_stride)
        for (int column = 0; column < span.columns; ++column) f(i++, place + column * stride);
    }
  }

  // The tile's elements of an operand in the arithmetic's type: in place if they lie there in one
  // piece and fill it, else in the buffer, followed by zeros up to whole vectors.
  BCE_INLINE const Scalar* load(const Operand& operand, int64_t RowStart::* start, const Span& span,
                                Scalar* buffer) const {
    const int size = span.size();
    const int64_t row_stride = last_ > 0 ? operand.strides[last_ - 1] : 0;
    const int64_t stride = span.rows > 1 && span.columns == 1 ? row_stride : operand.strides[last_];
    const bool one_piece = segments_ == 1 && (span.rows == 1 || span.columns == 1 ||
                                              row_stride == stride * span.columns);
    const int64_t begin = segment_[0].start.*start + span.column * stride;
    if (operand.type == kTypeOf<Scalar> && one_piece && stride == 1 && size == kTile)
      return static_cast<const Scalar*>(operand.data) + begin;
    return dispatch(operand.type, [&](auto* type) -> const Scalar* {
      using Stored = std::remove_pointer_t<decltype(type)>;
      const Stored* data = static_cast<const Stored*>(operand.data);
      const Stored* from = data + begin;
      if (one_piece && stride == 1) {
        widen(from, size, buffer);
      } else if (one_piece && stride == 0) {
        const Scalar value = convert<Scalar>(*from);
        for (int i = 0; i < size; ++i) buffer[i] = value;
      } else {
        for_each_place(operand, start, span,
                       [&](int i, int64_t place) { buffer[i] = convert<Scalar>(data[place]); });
      }
      for (int i = size; i % kSumLanes; ++i) buffer[i] = 0;
      return buffer;
    });
  }

  BCE_INLINE void load_labels(const Span& span) {
    tile_.labels = load(problem_.labels, &RowStart::labels, span, labels_);
  }

  // What results are multiplied by: of all, of each row, or of each element.
  void load_factors(const Span& span) {
    loaded_ = true;
    const bool one = one_for_all_ || (one_for_row_ && span.rows == 1);
    const Span of_rows = {span.row, 0, span.rows, 1};
    const Span& own = one_for_row_ ? of_rows : span;
    const int count = one ? 1 : own.size(), width = one ? kTile : one_for_row_ ? span.columns : 1;
    Scalar scale_buffer[kTile], divisor_buffer[kTile], low_buffer[kTile];
    const auto numbers = [&](const Operand& operand, int64_t RowStart::* start, Scalar* buffer) {
      if (!one) return load(operand, start, own, buffer);
      return static_cast<const Scalar*>(operand.data) + segment_[0].start.*start;
    };
    const Scalar* scale = numbers(problem_.scale, &RowStart::scale, scale_buffer);
    for (int i = 0; i < count; ++i) scale_[i] = scale[i] * problem_.inverse_count;
    if (problem_.divisor.data) {
      const Scalar* divisor = numbers(problem_.divisor, &RowStart::divisor, divisor_buffer);
      const Scalar* lost = numbers(problem_.divisor_low, &RowStart::divisor_low, low_buffer);
      for (int i = 0; i < count; ++i)
        divisor_[i] = static_cast<double>(divisor[i]) + static_cast<double>(lost[i]);
    } else {
      for (int i = 0; i < count; ++i) divisor_[i] = 1;
    }

    // Nearly all are positive and have no power.
    bool usual = true;
    for (int i = 0; i < count; ++i) {
      const double ratio = scale_[i] / divisor_[i];
      usual &= ratio <= Factor<Scalar>::kPower && ratio >= 1 / Factor<Scalar>::kPower;
      rest_[i] = static_cast<Scalar>(ratio);
    }
    zeros_ = dropped_ = powers_ = false;
    tame_ = true;
    if (!usual) {
      dropped_ = true;
      for (int i = 0, k = 0; i < count; ++i) {
        const Factor<Scalar> factor(scale_[i], divisor_[i]);
        scale_[i] = factor.scale;
        rest_[i] = factor.rest;
        dropped_ &= factor.is_zero();
        zeros_ |= factor.is_zero();
        powers_ |= factor.power != 1;
        tame_ &= factor.rest > 0 && factor.rest <= Factor<Scalar>::kPower;
        for (const int end = k + width; k < end; ++k)
          power_[k] = factor.is_zero() ? Scalar(0) : static_cast<Scalar>(factor.power);
      }
    }
    for (int i = 0, k = 0; i < count; ++i)
      for (const int end = k + width; k < end; ++k) tile_.factors[k] = rest_[i];
    for (int k = count * width; k % kSumLanes; ++k) tile_.factors[k] = 1;

    tile_.smoothed = false;
    if (one) {
      const Scalar smoothing = *numbers(problem_.smoothing, &RowStart::smoothing, nullptr);
      for (Scalar& value : tile_.smoothing) value = smoothing;
      tile_.smoothed = smoothing != 0;
    } else {
      const Scalar* smoothing =
          load(problem_.smoothing, &RowStart::smoothing, span, tile_.smoothing);
      for (int k = 0; k < span.size(); ++k) tile_.smoothed |= smoothing[k] != 0;
      if (smoothing != tile_.smoothing)
        std::memcpy(tile_.smoothing, smoothing, sizeof tile_.smoothing);
    }
  }

  // Loads the modifiers of a tile, and puts a harmless element in the place of one that does not
  // exist.
  Modified modify(const Span& span) {
    using V = Vector<Scalar>;
    const int filled = span.size();
    const int64_t element = span.row * problem_.columns() + span.column;
    const auto given = [&](ModifierName name) { return problem_.modifiers[name].data != nullptr; };
    bool constant;
    const auto numbers = [&](ModifierName name, Scalar* buffer) {
      return ::jax_bce::load(problem_.modifiers[name], element, filled, buffer, &constant);
    };
    alignas(64) Scalar buffer[kTile];
    const auto begin_mask = [&] {
      for (int i = 0; !masked_ && i < filled; ++i) keep_[i] = 1;
      masked_ = true;
    };
    if (given(kWhere)) {
      const Scalar* where = numbers(kWhere, keep_);
      if (constant && where[0] == 0) return Modified::kDropped;
      masked_ = !constant;
    }
    if (given(kIgnoreLabel)) {
      begin_mask();
      ignore(span);
    }
    if (zeros_) {
      begin_mask();
      for (int i = 0; i < filled; ++i) keep_[i] = power_[i] == 0 ? 0 : keep_[i];
    }
    const bool other_than_mask = given(kWeight) || given(kSampleWeight) || given(kPosWeight);
    if (sizeof(Scalar) == 4 && !other_than_mask && !powers_ && !problem_.total) return mask(span);
    const bool two_weights = given(kWeight) && given(kSampleWeight);
    const bool weighs = given(kWeight) || given(kSampleWeight) || powers_;
    // Each element's weight is one number, or a product with pos_weight where that is 1 or the
    // label.
    const bool exact = !two_weights && !powers_ && !(weighs && given(kPosWeight));
    if (given(kWeight) || given(kSampleWeight)) {
      const Scalar* weight = numbers(given(kWeight) ? kWeight : kSampleWeight, buffer);
      std::memcpy(tile_.weight, weight, filled * sizeof(Scalar));
    } else {
      for (Scalar& weight : tile_.weight) weight = 1;
    }
    if (two_weights) {
      const Scalar* other = numbers(kSampleWeight, buffer);
      for_each_vector<V>(tile_.size, [&](int i) {
        const auto a = V::load(tile_.weight + i), b = V::load(other + i);
        V::store(tile_.weight + i, a * b);
        V::store(tile_.weight_low + i, V::fma(a, b, -(a * b)));
      });
    } else if (!exact || problem_.total) {
      for (Scalar& low : tile_.weight_low) low = 0;
    }
    if (powers_) {
      for (int i = 0; i < filled; ++i) {
        tile_.weight[i] *= power_[i];
        tile_.weight_low[i] *= power_[i];
      }
    }
    tile_.pos_weight = given(kPosWeight) ? numbers(kPosWeight, pos_weight_) : ones<Scalar>();

    const Modified kept = exact ? Modified::kExact : Modified::kAny;
    int count = filled;
    if (masked_) {
      typename V::Float counts = {};
      for (int i = filled; i < tile_.size; ++i) keep_[i] = 0;
      for_each_vector<V>(tile_.size, [&](int i) {
        counts += V::select(V::load(keep_ + i) != V::set(0), V::set(1), V::set(0));
      });
      count = count_of(counts);
    }
    if (count == filled) masked_ = false;
    if (!masked_) return weighs || given(kPosWeight) ? kept : Modified::kNot;
    if (count == 0) return Modified::kDropped;

    for_each_vector<V>(tile_.size, [&](int i) {
      const auto exists = V::load(keep_ + i) != V::set(0);
      const auto select = [&](Scalar* to, const Scalar* from, Scalar otherwise) {
        V::store(to + i, V::select(exists, V::load(from + i), V::set(otherwise)));
      };
      select(tile_.weight, tile_.weight, 0);
      if (two_weights) select(tile_.weight_low, tile_.weight_low, 0);
      if (problem_.total) return;
      select(logits_, tile_.logits, 0);
      select(labels_, tile_.labels, 0);
      if (given(kPosWeight)) select(pos_weight_, tile_.pos_weight, 1);
    });
    if (problem_.total) return kept;
    tile_.logits = logits_;
    tile_.labels = labels_;
    if (given(kPosWeight)) tile_.pos_weight = pos_weight_;
    return kept;
  }

  // modify() where elements only exist or do not.
  Modified mask(const Span& span) {
    using V = Vector<Scalar>;
    if (!masked_) return Modified::kNot;
    const int filled = span.size();
    for (int i = filled; i < tile_.size; ++i) keep_[i] = 0;
    typename V::Float counts = {};
    for_each_vector<V>(tile_.size, [&](int i) {
      const auto keep = V::load(keep_ + i), zero = V::set(0);
      const auto dropped = keep == zero;
      counts += keep;
      V::store(tile_.weight + i, keep);
      V::store(logits_ + i, V::select(dropped, zero, V::load(tile_.logits + i)));
      V::store(labels_ + i, V::select(dropped, zero, V::load(tile_.labels + i)));
    });
    const int count = count_of(counts);
    if (count == filled) masked_ = false;
    if (!masked_) return Modified::kNot;
    tile_.logits = logits_;
    tile_.labels = labels_;
    tile_.pos_weight = ones<Scalar>();
    return count == 0 ? Modified::kDropped : Modified::kMasked;
  }

  static int count_of(typename Vector<Scalar>::Float ones) {
    int count = 0;
    for (int i = 0; i < Vector<Scalar>::kLanes; ++i) count += static_cast<int>(ones[i]);
    return count;
  }

  // Loads the numbers of a focal loss for a tile. One number is loaded only once.
  void focus(const Span& span) {
    const int64_t element = span.row * problem_.columns() + span.column;
    const auto is_one = [&](ModifierName name) {
      const Modifier& modifier = problem_.modifiers[name];
      return modifier.rank == 1 && modifier.strides[0] == 0;
    };
    const auto numbers = [&](ModifierName name, Scalar* buffer) -> const Scalar* {
      const Modifier& modifier = problem_.modifiers[name];
      if (!modifier.data) return nullptr;
      if (is_one(name) && focused_) return buffer;
      bool constant;
      const int size = is_one(name) ? kTile : span.size();  // later tiles may be larger
      return ::jax_bce::load(modifier, element, size, buffer, &constant);
    };
    tile_.alpha = numbers(kAlpha, focal_[0]);
    tile_.gamma = numbers(kGamma, focal_[1]);
    tile_.gamma_pos = numbers(kGammaPos, focal_[2]);
    tile_.clip = numbers(kClip, focal_[3]);
    if (tile_.clip && !(is_one(kClip) && focused_))
      logits_of(tile_.clip, is_one(kClip) ? kTile : tile_.size, focal_[4], focal_[5]);
    tile_.clip_logit = focal_[4];
    tile_.clip_logit_low = focal_[5];
    if (!tile_.gamma_pos) tile_.gamma_pos = tile_.gamma;
    tile_.products = is_one(kGamma) && (!problem_.modifiers[kGammaPos].data || is_one(kGammaPos));
    for (const auto& [gammas, integer] : {std::pair(tile_.gamma, &tile_.integer_neg),
                                          std::pair(tile_.gamma_pos, &tile_.integer_pos)}) {
      const Scalar gamma = gammas[0];
      tile_.products &= gamma == 0 || gamma == 1 || gamma == 2 || gamma == 4;
      *integer = tile_.products ? static_cast<int>(gamma) : 0;
    }
    focused_ = true;
  }

  // Loads the floor of the second derivatives of a tile. One number is loaded only once.
  void load_floor(const Span& span) {
    const Modifier& modifier = problem_.modifiers[kHessFloor];
    const bool one = modifier.rank == 1 && modifier.strides[0] == 0;
    if (one && tile_.hess_floor) return;
    bool constant;
    const int64_t element = span.row * problem_.columns() + span.column;
    const int size = one ? kTile : span.size();  // later tiles may be larger
    tile_.hess_floor = ::jax_bce::load(modifier, element, size, hess_floor_, &constant);
  }

  // Drops the elements whose label, as it is stored, is ignore_label.
  void ignore(const Span& span) {
    const Modifier& modifier = problem_.modifiers[kIgnoreLabel];
    const int64_t element = span.row * problem_.columns() + span.column;
    const bool one = modifier.rank == 1 && modifier.strides[0] == 0;
    dispatch(modifier.type, [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      const Stored* ignored = static_cast<const Stored*>(modifier.data);
      if constexpr (sizeof(Stored) < sizeof(Scalar) || std::is_same_v<Stored, Scalar>) {
        if (one) {  // the arithmetic's type holds them all
          const Scalar other = convert<Scalar>(*ignored);
          for (int i = 0; i < span.size(); ++i) keep_[i] = tile_.labels[i] == other ? 0 : keep_[i];
          return;
        }
      }
      const Stored* labels = static_cast<const Stored*>(problem_.labels.data);
      for_each_place(problem_.labels, &RowStart::labels, span, [&](int i, int64_t place) {
        const Stored other = ignored[one ? 0 : modifier.offset(element + i)];
        using Exact = std::conditional_t<std::is_class_v<Stored>, float, Stored>;
        if (convert<Exact>(labels[place]) == convert<Exact>(other)) keep_[i] = 0;
      });
    });
  }

  const Problem& problem_;
  const int last_;  // dimension
  bool one_for_all_, one_for_row_;
  Span located_ = {-1, 0, 0, 0};  // whose segments these are
  int segments_ = 0;
  Segment segment_[kTile];
  // Whether the factors are loaded, all are 0, one is 0, one has a power, and all are finite and
  // not negative.
  bool loaded_ = false, dropped_, zeros_, powers_, tame_;
  double scale_[kTile], divisor_[kTile];  // of which the factors are made
  bool masked_;                           // by keep_
  bool focused_ = false;                  // whether the numbers of a focal loss were loaded
  Tile<Scalar> tile_;
  alignas(64) Scalar logits_[kTile], labels_[kTile];
  alignas(64) Scalar pos_weight_[kTile], power_[kTile], keep_[kTile], rest_[kTile];
  alignas(64) Scalar focal_[6][kTile], hess_floor_[kTile];
};

// Evaluates elements, tile by tile. If kHessian, losses are second derivatives.
template <class Scalar, bool kReduce, bool kLoss, bool kGradient, bool kHessian>
class Evaluation : Inputs<Scalar> {
 public:
  explicit Evaluation(const Problem& problem) : Inputs<Scalar>(problem) {
    const auto has_16_bits = [](Type type) { return type == Type::kF16 || type == Type::kBF16; };
    // A float32 gradient of 16-bit logits is rounded to 16 bits once its cotangent is known.
    narrow_ =
        has_16_bits(problem.logits.type) && (!kLoss || kReduce || has_16_bits(problem.loss.type));
  }

  // Its losses, if they are to be added up, are in the tile that is returned, up to the next
  // multiple of kSumLanes.
  BCE_INLINE const Tile<Scalar>& evaluate(const Span& span) {
    const int filled = span.size();
    begin(span);
    const int64_t offset = span.row * problem_.columns() + span.column;
    tile_.loss = kReduce ? loss_ : target(problem_.loss, offset, filled, loss_);
    tile_.gradient = target(problem_.gradient, offset, filled, gradient_);
    if (dropped_) {
      drop();
    } else if (problem_.total) {
      if (problem_.modifiers[kIgnoreLabel].data) load_labels(span);
      modify(span) == Modified::kDropped ? drop() : take_weights();
    } else {
      tile_.logits = load(problem_.logits, &RowStart::logits, span, logits_);
      load_labels(span);
      evaluate_elements(span);
    }
    if constexpr (kReduce)
      for (int i = filled; i < tile_.size; ++i) tile_.loss[i] = tile_.loss_low[i] = 0;
    if (kLoss && !kReduce && tile_.loss == loss_) store(problem_.loss, offset, filled, loss_);
    if (kGradient && tile_.gradient == gradient_)
      store(problem_.gradient, offset, filled, gradient_);
    return tile_;
  }

  // Where less code matters more than the cost of a call for each tile.
  [[gnu::noinline]] const Tile<Scalar>& evaluate_apart(const Span& span) { return evaluate(span); }

  // Writes the losses of the rows of the last tile.
  void finish(const double* sums) const {
    double losses[kTile];
    // Between the factors of two rows.
    const int step = one_for_all_ ? 0 : one_for_row_ ? 1 : located_.columns;
    for (int i = 0; i < located_.rows; ++i) {
      const int own = i * step;
      const double loss = sums[i] * scale_[own] / divisor_[own];
      losses[i] = scale_[own] == 0 || divisor_[own] == 0 ? 0 : loss;
    }
    for (int i = 0; i < located_.rows; ++i) finish_row(problem_, located_.row + i, losses[i]);
  }

 private:
  using Inputs<Scalar>::begin;
  using Inputs<Scalar>::divisor_;
  using Inputs<Scalar>::dropped_;
  using Inputs<Scalar>::focus;
  using Inputs<Scalar>::keep_;
  using Inputs<Scalar>::labels_;
  using Inputs<Scalar>::load;
  using Inputs<Scalar>::load_floor;
  using Inputs<Scalar>::load_labels;
  using Inputs<Scalar>::located_;
  using Inputs<Scalar>::logits_;
  using Inputs<Scalar>::masked_;
  using Inputs<Scalar>::modify;
  using Inputs<Scalar>::one_for_all_;
  using Inputs<Scalar>::one_for_row_;
  using Inputs<Scalar>::powers_;
  using Inputs<Scalar>::problem_;
  using Inputs<Scalar>::scale_;
  using Inputs<Scalar>::tame_;
  using Inputs<Scalar>::tile_;
  using Inputs<Scalar>::zeros_;

  BCE_INLINE void evaluate_elements(const Span& span) {
    const bool modifies = problem_.modified || zeros_ || powers_;
    const Modified modified = modifies ? modify(span) : Modified::kNot;
    if (modified == Modified::kDropped) {
      drop();
    } else if (problem_.is_focal()) {
      evaluate_focal(span, modified);
    } else {
      if constexpr (kHessian) load_floor(span);
      evaluate_plain(modified);
    }
    // A factor that is not a number, or negative, would show where an element does not exist, and
    // so would the sign of a focal gradient.
    if (masked_ && !(tame_ && !problem_.is_focal())) {
      for (int i = 0; i < span.size(); ++i) {
        if (keep_[i] != 0) continue;
        if constexpr (kLoss && !kReduce) tile_.loss[i] = 0;
        if constexpr (kGradient) tile_.gradient[i] = 0;
      }
    }
  }

  BCE_INLINE void evaluate_plain(Modified modified) {
    if constexpr (sizeof(Scalar) == 4) {
      if (narrow_ && modified != Modified::kAny) return evaluate_narrow(modified);
    }
    evaluate_pairs(modified);
  }

  BCE_INLINE void evaluate_pairs(Modified modified) {
    has_low_ = true;
    if (is_common()) {
      if (modified == Modified::kNot) compute<true, Modified::kNot>();
      if constexpr (sizeof(Scalar) == 4)
        if (modified == Modified::kMasked) compute<true, Modified::kMasked>();
      if (modified == Modified::kExact) compute<true, Modified::kExact>();
      if (modified == Modified::kAny) compute<true, Modified::kAny>();
    } else {
      if (modified != Modified::kAny)  // all weights are exact
        for (Scalar& low : tile_.weight_low) low = 0;
      modified == Modified::kNot ? compute<false, Modified::kNot>()
                                 : compute<false, Modified::kAny>();
    }
  }

  BCE_INLINE void evaluate_narrow(Modified modified) {
    if (!all_others_ && !tile_.smoothed) {
      const Found found = narrow(modified, tile_.loss, tile_.gradient);
      if (found.common && found.hard) {
        if (kReduce && has_low_) std::memset(tile_.loss_low, 0, sizeof tile_.loss_low);
        has_low_ = false;
        tile_.narrow = modified != Modified::kExact;
        return;
      }
    }
    evaluate_mixed(modified);
  }

  // The common elements of a tile that has others, too, get the results that they get elsewhere.
  [[gnu::noinline]] void evaluate_mixed(Modified modified) {
    constexpr Scalar kLimit = Format<Scalar>::kCommon;
    bool common[kTile];
    all_others_ = true;
    for (int i = 0; i < tile_.size; ++i) {
      const Scalar logit = tile_.logits[i], label = tile_.labels[i];
      common[i] = logit >= -kLimit && logit <= kLimit && (label == 0 || label == 1) &&
                  tile_.smoothing[i] == 0;
      all_others_ &= !common[i];
    }
    evaluate_pairs(modified);
    if (all_others_) return;
    alignas(64) Scalar loss[kTile], gradient[kTile];
    narrow(modified, loss, gradient);
    for (int i = 0; i < tile_.size; ++i) {
      if (!common[i]) continue;
      if constexpr (kLoss) tile_.loss[i] = loss[i];
      if constexpr (kReduce) tile_.loss_low[i] = 0;
      if constexpr (kGradient) tile_.gradient[i] = gradient[i];
    }
  }

  BCE_INLINE Found narrow(Modified modified, Scalar* loss, Scalar* gradient) const {
    const auto evaluate = [&](auto modified) {
      return narrow_elements<modified, kReduce, kLoss, kGradient, kHessian>(tile_, loss, gradient);
    };
    return modified == Modified::kNot      ? evaluate(Constant<Modified::kNot>())
           : modified == Modified::kMasked ? evaluate(Constant<Modified::kMasked>())
                                           : evaluate(Constant<Modified::kExact>());
  }

  // The first step. Returns whether the elements are such that kCommon allows in the second.
  template <bool kPrecise = false>
  BCE_INLINE bool is_common() {
    const Found found = exponentials<true, kPrecise>(tile_);
    if (found.common && found.hard && !powers_) return true;
    if (found.common)
      for (Scalar& scale : tile_.e_scale) scale = 1;
    else
      exponentials<false, kPrecise>(tile_);
    return false;
  }

  void evaluate_focal(const Span& span, Modified modified) {
    focus(span);
    if (modified != Modified::kAny)  // all weights are exact
      for (Scalar& low : tile_.weight_low) low = 0;
    const bool weighs = modified != Modified::kNot;
    const bool common = tile_.clip ? is_common<true>() : is_common();
    common ? focal_elements<true>(tile_, problem_, weighs)
           : focal_elements<false>(tile_, problem_, weighs);
  }

  template <bool kCommon, Modified kModified>
  BCE_INLINE void compute() {
    elements<kCommon, kModified, kReduce, kLoss, kGradient, kHessian>(tile_, problem_.loss.type,
                                                                      problem_.gradient.type);
  }

  // What elements that do not exist give.
  void drop() {
    for (int i = 0; i < tile_.size; ++i) {
      if constexpr (kLoss) tile_.loss[i] = tile_.loss_low[i] = 0;
      if constexpr (kGradient) tile_.gradient[i] = 0;
    }
  }

  void take_weights() {
    if constexpr (kLoss) {
      using V = Vector<Scalar>;
      for_each_vector<V>(tile_.size, [&](int i) {
        const auto weight =
            finite_low<V>({V::load(tile_.weight + i), V::load(tile_.weight_low + i)});
        V::store(tile_.loss + i, weight.high);
        V::store(tile_.loss_low + i, weight.low);
      });
    }
  }

  bool narrow_;              // whether common elements need no pairs: all is rounded to 16 bits
  bool all_others_ = false;  // whether the last tile had no such elements
  bool has_low_ = true;      // whether the tile's loss_low may be other than 0
  alignas(64) Scalar loss_[kTile], gradient_[kTile];
};

// Whether the total of a block is the number of elements that a mask of bools, or a whole number as
// ignore_label, keeps; and that number, which is exact in any order.
template <class Scalar>
bool count_kept(const Problem& problem, int64_t row, int64_t begin, int64_t size, double* total) {
  const Modifier &where = problem.modifiers[kWhere], &ignored = problem.modifiers[kIgnoreLabel];
  const RowStart start = problem.row_start(row);
  if (problem.modifiers[kWeight].data || problem.modifiers[kSampleWeight].data ||
      (where.data && ignored.data) || problem.factor_at<Scalar>(start, 0).power != 1)
    return false;
  int64_t kept = 0;
  if (where.data && where.rank == 1 && where.strides[0] == 1) {
    const auto* mask = static_cast<const uint8_t*>(where.data) + row * problem.columns() + begin;
    for (int64_t i = 0; i < size; ++i) kept += mask[i] != 0;
  } else if (ignored.data && ignored.rank == 1 && ignored.strides[0] == 0 &&
             problem.labels.strides[problem.rank - 1] == 1 && !is_float(problem.labels.type)) {
    dispatch(problem.labels.type, [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_integral_v<Stored>) {
        const auto* labels = static_cast<const Stored*>(problem.labels.data) + start.labels + begin;
        const Stored other = *static_cast<const Stored*>(ignored.data);
        for (int64_t i = 0; i < size; ++i) kept += labels[i] != other;
      }
    });
  } else {
    return false;
  }
  *total = static_cast<double>(kept);
  return true;
}

// The sum of a block, if problem.reduce.
template <class Scalar, bool kReduce, bool... kResults>
double block(const Problem& problem, Evaluation<Scalar, kReduce, kResults...>& evaluation,
             int64_t row, int64_t begin, int64_t size) {
  double threads[kFold] = {}, sum = 0;
  if (kReduce && problem.total && count_kept<Scalar>(problem, row, begin, size, &sum)) return sum;
  for (int64_t done = 0; done < size; done += kTile) {
    const int filled = static_cast<int>(size - done < kTile ? size - done : kTile);
    const Span span = {row, begin + done, 1, filled};
    constexpr bool kApart = sizeof(Scalar) == 8;  // float64 is rare
    const Tile<Scalar>& tile = kApart ? evaluation.evaluate_apart(span) : evaluation.evaluate(span);
    if constexpr (kReduce) {
      sum_tile(tile, threads + done % kGroup / kTile * kTileThreads);
      if ((done + kTile) % kGroup == 0 || done + kTile >= size) {
        sum += fold(threads);
        for (double& thread : threads) thread = 0;
      }
    }
  }
  return sum;
}

template <class Scalar>
double row_loss(const Problem& problem, int64_t row, double sum) {
  const RowStart start = problem.row_start(row);
  return problem.factor_at<Scalar>(start, 0).times(sum);
}

// The sum of a short row, at most a tile.
template <class Scalar>
BCE_INLINE double sum_row(const Scalar* high, const Scalar* low, int size) {
  if (size <= kQuad) {  // of one thread
    const auto lane = [&](int c) {
      return c < size ? static_cast<double>(high[c]) + static_cast<double>(low[c]) : 0;
    };
    return (lane(0) + lane(2)) + (lane(1) + lane(3));
  }
  double lanes[kSumLanes] = {}, threads[kTileThreads];
  Scalar lanes_low[kSumLanes] = {};
  for (int begin = 0; begin < size; begin += kSumLanes) {
    const int end = size - begin < kSumLanes ? size - begin : kSumLanes;
    for (int i = 0; i < end; ++i) {
      lanes[i] += high[begin + i];
      lanes_low[i] += low[begin + i];
    }
  }
  for (int i = 0; i < kSumLanes; ++i) lanes[i] += lanes_low[i];
  for (int t = 0; t < kTileThreads; ++t) {
    const double* lane = lanes + t * kQuad;
    threads[t] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
  for (int half = kTileThreads / 2; half > 0; half /= 2)
    for (int t = 0; t < half; ++t) threads[t] += threads[t + half];
  return threads[0];
}

template <class Scalar, bool kReduce, bool... kResults>
void rows(const Problem& problem, int64_t first, int64_t last) {
  const GradualUnderflow mode;
  const int columns = static_cast<int>(problem.columns());
  Evaluation<Scalar, kReduce, kResults...> evaluation(problem);
  if (columns > 0 && columns <= kShortRow) {
    const int rows_in_tile = kTile / columns;
    for (int64_t row = first; row < last; row += rows_in_tile) {
      const int rows = static_cast<int>(last - row < rows_in_tile ? last - row : rows_in_tile);
      const Tile<Scalar>& tile = evaluation.evaluate_apart({row, 0, rows, columns});
      if constexpr (kReduce) {
        double sums[kTile];
        for (int i = 0; i < rows; ++i)
          sums[i] = sum_row(tile.loss + i * columns, tile.loss_low + i * columns, columns);
        evaluation.finish(sums);
      }
    }
    return;
  }
  for (int64_t row = first; row < last; ++row) {
    const double sum = block(problem, evaluation, row, 0, columns);
    if constexpr (kReduce) finish_row(problem, row, row_loss<Scalar>(problem, row, sum));
  }
}

// Calls f with the results as template arguments.
template <class F>
BCE_INLINE auto specialize(const Problem& problem, F f) {
  using Yes = std::true_type;
  using No = std::false_type;
  const auto reduced = [&](auto reduce) {
    return problem.gradient.data ? f(reduce, Yes(), Yes(), No()) : f(reduce, Yes(), No(), No());
  };
  if (problem.hessian) return f(No(), Yes(), Yes(), Yes());
  if (!problem.loss.data) return f(No(), No(), Yes(), No());
  return problem.reduce ? reduced(Yes()) : reduced(No());
}

template <class Scalar>
double any_block(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  return specialize(problem, [&](auto... results) {
    const GradualUnderflow mode;
    Evaluation<Scalar, results...> evaluation(problem);
    return block(problem, evaluation, row, begin, size);
  });
}

template <class Scalar>
void any_rows(const Problem& problem, int64_t first, int64_t last) {
  specialize(problem, [&](auto... results) { rows<Scalar, results...>(problem, first, last); });
}

template <class Scalar>
void finish_blocks(const Problem& problem, int64_t row, const double* sums, int64_t blocks) {
  const GradualUnderflow mode;
  double threads[kGroupsInBlock * kFold] = {}, sum = 0;
  for (int64_t block = 0; block < blocks; ++block)
    threads[block % (kGroupsInBlock * kFold)] += sums[block];
  for (int i = 0; i < kGroupsInBlock; ++i) sum += fold(threads + i * kFold);
  finish_row(problem, row, row_loss<Scalar>(problem, row, sum));
}

template <class Scalar>
constexpr CpuLoop kLoop = {any_block<Scalar>, any_rows<Scalar>, finish_blocks<Scalar>};

}  // namespace
}  // namespace jax_bce
