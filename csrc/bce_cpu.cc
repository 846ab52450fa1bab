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

  static BCE_INLINE Float divide(Float a, Float b) { return a / b; }

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

// A row of an operand, from element `begin` on.
template <class Scalar>
struct Stream {
  const Operand& operand;
  int64_t stride;  // 0 or 1
  int64_t start;

  Stream(const Operand& operand, int rank, int64_t row_start, int64_t begin)
      : operand(operand), stride(operand.strides[rank - 1]), start(row_start + begin * stride) {}

  // The next `size` elements in the arithmetic's type: in place if they lie there and fill a tile,
  // else in the buffer, followed by zeros up to whole vectors.
  const Scalar* load(int64_t done, int size, Scalar* buffer) const {
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
      for (int i = size; i % kSumLanes; ++i) buffer[i] = 0;
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
  alignas(64) Scalar factors[kTile], smoothing[kTile];
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
  bool common = !tile.smoothed;
  for (int i = 0; i < V::kLanes; ++i) common &= largest[i] <= limit[i] && soft[i] == 0;
  return common;
}

// What the modifiers of a tile come to: no element exists; nothing; a positive weight; or anything.
enum class Modified { kDropped, kNot, kPositive, kAny };

// The second step: the loss, the gradient, or both.
template <bool kCommon, Modified kModified, bool kReduce, bool kLoss, bool kGradient, class Scalar>
BCE_INLINE void elements(Tile<Scalar>& tile, Type loss_type, Type gradient_type) {
  using V = Vector<Scalar>;
  const Scalar *logits = tile.logits, *labels = tile.labels;
  Scalar *loss = tile.loss, *gradient = tile.gradient;
  for_each_vector<V>(tile.size, [&](int i) {
    const auto logit = V::load(logits + i), label = V::load(labels + i);
    auto factor = V::load(tile.factors + i);
    typename V::Float smoothing = {};
    if constexpr (!kCommon) smoothing = V::load(tile.smoothing + i);
    Weight<typename V::Float> weight = {};
    constexpr bool kAny = kModified == Modified::kAny;
    if constexpr (kModified == Modified::kPositive) {
      static_assert(kCommon);  // labels are 0 or 1
      const auto one = V::set(1);
      weight.weight.high = V::select(label == one, V::load(tile.pos_weight + i), one);
      factor = factor * weight.weight.high;
    } else if constexpr (kAny) {
      weight = weight_of<V>({V::load(tile.weight + i), V::load(tile.weight_low + i)},
                            V::load(tile.pos_weight + i), label, smoothing);
      factor = factor * weight.weight.high;
    }
    const Exponential<V> exponential = {V::load(tile.e + i), V::load(tile.e_low + i),
                                        V::load(tile.e_scale + i)};
    const auto write = [&](Scalar* to, Pair<typename V::Float> value, Type type) {
      value = fast_two_sum(value.high, value.low);
      // For bfloat16, with fewer digits than half of float32's, this would change nothing for
      // labels 0 and 1: their results are rounded as if once, all of them (the exhaustive run).
      if (type == Type::kF16) value.high = round_to_odd<V>(value.high, value.low);
      if constexpr (kAny && !kCommon)
        V::store(to + i, weighted<V>({value.high, V::set(0)}, factor).high);
      else
        V::store(to + i, value.high * factor);
    };
    if constexpr (kLoss) {
      auto value =
          loss_of<V, kCommon, kAny>(logit, label, smoothing, exponential, weight.pos_weight);
      if constexpr (kReduce) {
        if constexpr (kModified == Modified::kPositive)
          value = weighted<V, true>(value, weight.weight.high);
        else if constexpr (kAny)
          value = weighted<V, kCommon>(value, weight.weight);
        V::store(loss + i, value.high);
        V::store(tile.loss_low + i, value.low);
      } else {
        write(loss, value, loss_type);
      }
    }
    if constexpr (kGradient)
      write(gradient,
            gradient_of<V, kCommon, kAny>(logit, label, smoothing, exponential, weight.pos_weight),
            gradient_type);
  });
}

// Evaluates a stretch of elements that lie side by side in every operand, tile by tile.
template <class Scalar, bool kReduce, bool kLoss, bool kGradient>
class Evaluation {
 public:
  Evaluation(const Problem& problem, int64_t row, int64_t begin)
      : problem_(problem),
        start_(problem.row_start(row)),
        logits_stream_(problem.logits, problem.rank, start_.logits, begin),
        labels_stream_(problem.labels, problem.rank, start_.labels, begin),
        scale_stream_(problem.scale, problem.rank, start_.scale, begin),
        smoothing_stream_(problem.smoothing, problem.rank, start_.smoothing, begin),
        result_start_(row * problem.columns() + begin),
        factors_vary_(scale_stream_.stride || smoothing_stream_.stride),
        modified_(problem.modified || scale_stream_.stride) {
    if (!factors_vary_) load_factors(0, kTile);
    if (modified_) {
      for (int i = 0; i < kTile; ++i) {
        tile_.weight[i] = pos_weight_[i] = 1;
        tile_.weight_low[i] = 0;
      }
      tile_.pos_weight = pos_weight_;
    }
  }

  // Elements [done, done + filled), at most a tile. Its losses, if they are to be added up, are in
  // the tile that is returned, up to the next multiple of kSumLanes.
  BCE_INLINE const Tile<Scalar>& evaluate(int64_t done, int filled) {
    tile_.size = (filled + kSumLanes - 1) / kSumLanes * kSumLanes;
    tile_.logits = logits_stream_.load(done, filled, logits_);
    tile_.labels = labels_stream_.load(done, filled, labels_);
    if (factors_vary_) load_factors(done, filled);
    const int64_t offset = result_start_ + done;
    tile_.loss = kReduce ? loss_ : target(problem_.loss, offset, filled, loss_);
    tile_.gradient = target(problem_.gradient, offset, filled, gradient_);
    const Modified modified = dropped_    ? Modified::kDropped
                              : modified_ ? modify(done, filled)
                                          : Modified::kNot;
    if (modified == Modified::kDropped) {
      drop();
    } else if (exponentials<true>(tile_)) {
      if (modified == Modified::kNot) compute<true, Modified::kNot>();
      if (modified == Modified::kPositive) compute<true, Modified::kPositive>();
      if (modified == Modified::kAny) compute<true, Modified::kAny>();
    } else {
      exponentials<false>(tile_);
      modified == Modified::kNot ? compute<false, Modified::kNot>()
                                 : compute<false, Modified::kAny>();
    }
    if constexpr (kReduce)
      for (int i = filled; i < tile_.size; ++i) tile_.loss[i] = tile_.loss_low[i] = 0;
    if constexpr (kLoss && !kReduce) store(problem_.loss, offset, filled, tile_.loss);
    if constexpr (kGradient) store(problem_.gradient, offset, filled, tile_.gradient);
    return tile_;
  }

 private:
  void load_factors(int64_t done, int filled) {
    const Scalar* scale = scale_stream_.load(done, filled, tile_.factors);
    for (int i = 0; i < filled; ++i)
      tile_.factors[i] = static_cast<double>(scale[i]) * problem_.inverse_count;
    const Scalar* smoothing = smoothing_stream_.load(done, filled, tile_.smoothing);
    if (smoothing != tile_.smoothing)
      std::memcpy(tile_.smoothing, smoothing, sizeof(Scalar) * kTile);
    // Unknown, or not zero: a smoothed label is not a hard one.
    tile_.smoothed = smoothing_stream_.stride || smoothing[0] != 0;
    dropped_ = !scale_stream_.stride && tile_.factors[0] == 0;
  }

  template <bool kCommon, Modified kModified>
  BCE_INLINE void compute() {
    elements<kCommon, kModified, kReduce, kLoss, kGradient>(tile_, problem_.loss.type,
                                                            problem_.gradient.type);
  }

  // What elements that do not exist give.
  void drop() {
    for (int i = 0; i < tile_.size; ++i) {
      if constexpr (kLoss) tile_.loss[i] = tile_.loss_low[i] = 0;
      if constexpr (kGradient) tile_.gradient[i] = 0;
    }
  }

  // Loads the modifiers of a tile, and puts a harmless element in the place of one that does not
  // exist.
  Modified modify(int64_t done, int filled) {
    using V = Vector<Scalar>;
    const int64_t element = result_start_ + done;
    const auto given = [&](ModifierName name) { return problem_.modifiers[name].data != nullptr; };
    bool constant;
    const auto numbers = [&](ModifierName name, Scalar* buffer) {
      return load(problem_.modifiers[name], element, filled, buffer, &constant);
    };
    alignas(64) Scalar keep[kTile], buffer[kTile];
    bool masked = false;
    const auto begin_mask = [&] {
      for (int i = 0; !masked && i < filled; ++i) keep[i] = 1;
      masked = true;
    };
    if (given(kWhere)) {
      numbers(kWhere, keep);
      if (constant && keep[0] == 0) return Modified::kDropped;
      masked = !constant;
    }
    if (given(kIgnoreLabel)) {
      begin_mask();
      ignore(done, filled, keep);
    }
    if (scale_stream_.stride) {
      begin_mask();
      for (int i = 0; i < filled; ++i) keep[i] = tile_.factors[i] == 0 ? 0 : keep[i];
    }
    const bool weighs = given(kWeight) || given(kSampleWeight);
    if (weighs) {
      const Scalar* weight = numbers(given(kWeight) ? kWeight : kSampleWeight, buffer);
      std::memcpy(tile_.weight, weight, filled * sizeof(Scalar));
      if (given(kWeight) && given(kSampleWeight)) {
        const Scalar* other = numbers(kSampleWeight, buffer);
        for_each_vector<V>(tile_.size, [&](int i) {
          const auto a = V::load(tile_.weight + i), b = V::load(other + i);
          V::store(tile_.weight + i, a * b);
          V::store(tile_.weight_low + i, V::fma(a, b, -(a * b)));
        });
      }
    } else {
      for (Scalar& weight : tile_.weight) weight = 1;
    }
    if (given(kPosWeight)) tile_.pos_weight = numbers(kPosWeight, pos_weight_);
    if (!masked)
      return weighs ? Modified::kAny : given(kPosWeight) ? Modified::kPositive : Modified::kNot;

    for (int i = filled; i < tile_.size; ++i) keep[i] = 0;
    typename V::Float kept = {};
    for_each_vector<V>(tile_.size, [&](int i) {
      const auto keeps = V::load(keep + i), zero = V::set(0);
      const auto select = [&](Scalar* to, const Scalar* from, typename V::Float otherwise) {
        V::store(to + i, V::select(keeps != zero, V::load(from + i), otherwise));
      };
      kept += keeps;
      select(logits_, tile_.logits, zero);
      select(labels_, tile_.labels, zero);
      select(tile_.weight, tile_.weight, zero);
      select(tile_.weight_low, tile_.weight_low, zero);
      select(pos_weight_, tile_.pos_weight, V::set(1));
    });
    tile_.logits = logits_;
    tile_.labels = labels_;
    tile_.pos_weight = pos_weight_;
    bool any = false;
    for (int i = 0; i < V::kLanes; ++i) any |= kept[i] != 0;
    return any ? Modified::kAny : Modified::kDropped;
  }

  // Takes away the elements whose label, as stored, is to be ignored.
  void ignore(int64_t done, int filled, Scalar* keep) {
    const Modifier& modifier = problem_.modifiers[kIgnoreLabel];
    const int64_t element = result_start_ + done;
    const bool one = modifier.rank == 1 && modifier.strides[0] == 0;
    dispatch(modifier.type, [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      const Stored* ignored = static_cast<const Stored*>(modifier.data);
      if constexpr (sizeof(Stored) < sizeof(Scalar) || std::is_same_v<Stored, Scalar>) {
        if (one) {  // the arithmetic's type holds them all
          const Scalar other = convert<Scalar>(*ignored);
          for (int i = 0; i < filled; ++i) keep[i] = tile_.labels[i] == other ? 0 : keep[i];
          return;
        }
      }
      const Stored* labels = static_cast<const Stored*>(problem_.labels.data) +
                             labels_stream_.start + done * labels_stream_.stride;
      for (int i = 0; i < filled; ++i) {
        const Stored label = labels[labels_stream_.stride ? i : 0];
        const Stored other = ignored[one ? 0 : modifier.offset(element + i)];
        using Exact = std::conditional_t<std::is_class_v<Stored>, float, Stored>;
        keep[i] = convert<Exact>(label) == convert<Exact>(other) ? 0 : keep[i];
      }
    });
  }

  const Problem& problem_;
  const RowStart start_;
  const Stream<Scalar> logits_stream_, labels_stream_, scale_stream_, smoothing_stream_;
  const int64_t result_start_;
  const bool factors_vary_, modified_;
  bool dropped_ = false;  // by a scale of 0
  Tile<Scalar> tile_;
  alignas(64) Scalar logits_[kTile], labels_[kTile], loss_[kTile], gradient_[kTile];
  alignas(64) Scalar pos_weight_[kTile];
};

template <class Scalar, bool kReduce, bool kLoss, bool kGradient>
double block(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  const GradualUnderflow mode;
  Evaluation<Scalar, kReduce, kLoss, kGradient> evaluation(problem, row, begin);
  double threads[kFold] = {}, sum = 0;
  for (int64_t done = 0; done < size; done += kTile) {
    const int filled = static_cast<int>(size - done < kTile ? size - done : kTile);
    const Tile<Scalar>& tile = evaluation.evaluate(done, filled);
    if constexpr (kReduce) {
      sum_threads(tile, threads + done % kGroup / kTile * kTileThreads);
      if ((done + kTile) % kGroup == 0 || done + kTile >= size) {
        sum += fold(threads);
        for (double& thread : threads) thread = 0;
      }
    }
  }
  return sum;
}

template <class Scalar>
void finish(const Problem& problem, int64_t row, double sum) {
  const double scale = static_cast<const Scalar*>(problem.scale.data)[problem.row_start(row).scale];
  const double loss = sum * scale * problem.inverse_count;
  if (problem.loss.type == Type::kF64)
    static_cast<double*>(problem.loss.data)[row] = loss;
  else
    static_cast<float*>(problem.loss.data)[row] = static_cast<float>(loss);
}

// The sum of a short row, at most a tile.
template <class Scalar>
double sum_row(const Scalar* high, const Scalar* low, int size) {
  double threads[kTileThreads] = {};
  for (int t = 0; t * kQuad < size && t < kTileThreads; ++t) {
    double lane[kQuad] = {};
    for (int c = 0; c < kQuad; ++c) {
      Scalar sum_low = 0;
      for (int i = t * kQuad + c; i < size; i += kSumLanes) {
        lane[c] += high[i];
        sum_low += low[i];
      }
      lane[c] += sum_low;
    }
    threads[t] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
  for (int half = kTileThreads / 2; half > 0; half /= 2)
    for (int t = 0; t < half; ++t) threads[t] += threads[t + half];
  return threads[0];
}

// Whether the rows lie side by side in every operand, so that a tile may hold several.
bool side_by_side(const Problem& problem) {
  const int64_t columns = problem.columns();
  if (problem.rank != 2) return false;
  const auto dense = [&](const Operand& operand) {
    return operand.strides[0] == columns * operand.strides[1];
  };
  const auto constant = [](const Operand& operand) {
    return operand.strides[0] == 0 && operand.strides[1] == 0;
  };
  return dense(problem.logits) && dense(problem.labels) && constant(problem.scale) &&
         constant(problem.smoothing);
}

template <class Scalar, bool kReduce, bool kLoss, bool kGradient>
void rows(const Problem& problem, int64_t first, int64_t last) {
  const GradualUnderflow mode;
  const int columns = static_cast<int>(problem.columns());
  if constexpr (kReduce) {
    if (columns > 0 && columns <= kShortRow && side_by_side(problem)) {
      Evaluation<Scalar, kReduce, kLoss, kGradient> evaluation(problem, first, 0);
      const int rows_in_tile = kTile / columns;
      for (int64_t row = first; row < last; row += rows_in_tile) {
        const int filled = static_cast<int>(last - row < rows_in_tile ? last - row : rows_in_tile);
        const Tile<Scalar>& tile = evaluation.evaluate((row - first) * columns, filled * columns);
        for (int i = 0; i < filled; ++i)
          finish<Scalar>(problem, row + i,
                         sum_row(tile.loss + i * columns, tile.loss_low + i * columns, columns));
      }
      return;
    }
  }
  for (int64_t row = first; row < last; ++row) {
    const double sum = block<Scalar, kReduce, kLoss, kGradient>(problem, row, 0, columns);
    if constexpr (kReduce) finish<Scalar>(problem, row, sum);
  }
}

// Calls f with the arithmetic's type and the results as template arguments.
template <class F>
BCE_INLINE auto specialize(const Problem& problem, F f) {
  const auto for_results = [&](auto* scalar) {
    using Yes = std::true_type;
    using No = std::false_type;
    if (!problem.loss.data) return f(scalar, No(), No(), Yes());
    if (problem.reduce)
      return problem.gradient.data ? f(scalar, Yes(), Yes(), Yes()) : f(scalar, Yes(), Yes(), No());
    return problem.gradient.data ? f(scalar, No(), Yes(), Yes()) : f(scalar, No(), Yes(), No());
  };
  return problem.scale.type == Type::kF64 ? for_results(static_cast<double*>(nullptr))
                                          : for_results(static_cast<float*>(nullptr));
}

double any_block(const Problem& problem, int64_t row, int64_t begin, int64_t size) {
  return specialize(problem, [&](auto* scalar, auto reduce, auto loss, auto gradient) {
    return block<std::remove_pointer_t<decltype(scalar)>, reduce, loss, gradient>(problem, row,
                                                                                  begin, size);
  });
}

void any_rows(const Problem& problem, int64_t first, int64_t last) {
  specialize(problem, [&](auto* scalar, auto reduce, auto loss, auto gradient) {
    rows<std::remove_pointer_t<decltype(scalar)>, reduce, loss, gradient>(problem, first, last);
  });
}

void finish_blocks(const Problem& problem, int64_t row, const double* sums, int64_t blocks) {
  const GradualUnderflow mode;
  double threads[kGroupsInBlock * kFold] = {}, sum = 0;
  for (int64_t block = 0; block < blocks; ++block)
    threads[block % (kGroupsInBlock * kFold)] += sums[block];
  for (int i = 0; i < kGroupsInBlock; ++i) sum += fold(threads + i * kFold);
  problem.scale.type == Type::kF64 ? finish<double>(problem, row, sum)
                                   : finish<float>(problem, row, sum);
}

}  // namespace

const CpuKernel BCE_KERNEL = {BCE_INSTRUCTION_SET, any_block, any_rows, finish_blocks};

}  // namespace jax_bce
