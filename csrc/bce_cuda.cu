// The CUDA loop. A warp evaluates a group of a row's elements. A thread block of eight warps
// evaluates a block of a long row, or eight short rows. A second kernel adds up the sums of a row's
// blocks, in the order defined in bce_problem.h.
//
// A thread takes four elements at a time. It starts with a loop of few instructions for the
// elements of nearly all training: aligned, labels 0 or 1, no smoothing. From the first exception
// on, a general loop takes over, so that the order stays the same.
//
// There is a kernel for each logits dtype and each label width, and one more for each logits dtype
// with modifiers. Everything else, including the labels' dtype, is the same for all threads and is
// decided at run time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "bce_cuda.h"
#include "bce_math.h"

namespace jax_bce {
namespace {

constexpr int kWarp = kFold, kWarps = kGroupsInBlock, kThreads = kWarp * kWarps;

// One element at a time.
template <class T>
struct Lane {
  using Scalar = T;
  using Float = T;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static BCE_INLINE T set(T value) { return value; }
  static BCE_INLINE T select(bool mask, T yes, T no) { return mask ? yes : no; }
  static BCE_INLINE T min(T a, T b) { return ::fmin(a, b); }
  static BCE_INLINE T max(T a, T b) { return ::fmax(a, b); }
  static BCE_INLINE T fma(T a, T b, T c) { return ::fma(a, b, c); }

  // Within an ulp in float32. Subnormal results may be flushed to 0.
  static BCE_INLINE T reciprocal(T b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) {
      asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(b));
      return b;
    }
#endif
    return 1 / b;
  }

  // In float32 only for 0 <= a <= 1 <= b <= 3. It takes a third of the instructions of a division
  // that is correctly rounded for all operands. In this range it is correctly rounded, too, except
  // for a few operands in 2^27. There the quotient is off by an ulp, for which the remainder, which
  // the formulas use, compensates.
  static BCE_INLINE T divide(T a, T b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) {
      const T approximate = reciprocal(b), quotient = a * approximate;
      return fma(fma(-b, quotient, a), approximate, quotient);
    }
#endif
    return a / b;
  }

  static BCE_INLINE Bits to_bits(T value) {
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  static BCE_INLINE T from_bits(Bits bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

__device__ float convert(__half value) { return __half2float(value); }
__device__ float convert(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float convert(float value) { return value; }
__device__ double convert(double value) { return value; }

__device__ void round_to(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void round_to(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ void round_to(float* to, float value) { *to = value; }
__device__ void round_to(double* to, double value) { *to = value; }

// Two numbers at once, with one instruction for each direction.
__device__ float convert_pair(__half, uint32_t pair, bool second) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(second ? pair >> 16 : pair)));
}
__device__ float convert_pair(__nv_bfloat16, uint32_t pair, bool second) {
  return __uint_as_float(second ? pair & 0xffff0000 : pair << 16);
}
__device__ __half2 round_pair(__half, float a, float b) { return __floats2half2_rn(a, b); }
__device__ __nv_bfloat162 round_pair(__nv_bfloat16, float a, float b) {
  return __floats2bfloat162_rn(a, b);
}

// A label of a type, from its bits.
template <class Scalar>
__device__ Scalar label_of(Type type, uint8_t bits) {
  return type == Type::kI8 ? static_cast<int8_t>(bits) : bits;
}
template <class Scalar>
__device__ Scalar label_of(Type type, uint16_t bits) {
  if (type == Type::kI16) return static_cast<int16_t>(bits);
  return type == Type::kF16 ? __half2float(__ushort_as_half(bits))
                            : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <class Scalar>
__device__ Scalar label_of(Type type, uint32_t bits) {
  return type == Type::kF32 ? __uint_as_float(bits)
                            : static_cast<Scalar>(static_cast<int32_t>(bits));
}
template <class Scalar>
__device__ Scalar label_of(Type type, uint64_t bits) {
  return static_cast<Scalar>(type == Type::kF64 ? __longlong_as_double(static_cast<long long>(bits))
                                                : static_cast<Scalar>(static_cast<int64_t>(bits)));
}

// Number i of an array of any type.
template <class Scalar>
__device__ Scalar number_at(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::kBool:
    case Type::kI8:
    case Type::kU8:
      return label_of<Scalar>(type, static_cast<const uint8_t*>(data)[i]);
    case Type::kF16:
    case Type::kBF16:
    case Type::kI16:
      return label_of<Scalar>(type, static_cast<const uint16_t*>(data)[i]);
    case Type::kF32:
    case Type::kI32:
      return label_of<Scalar>(type, static_cast<const uint32_t*>(data)[i]);
    default:
      return label_of<Scalar>(type, static_cast<const uint64_t*>(data)[i]);
  }
}

// Whether two numbers of a type are equal, as they are stored.
__device__ bool same_number(Type type, const void* a, int64_t i, const void* b, int64_t j) {
  switch (type) {
    case Type::kI32:
      return static_cast<const int32_t*>(a)[i] == static_cast<const int32_t*>(b)[j];
    case Type::kI64:
      return static_cast<const int64_t*>(a)[i] == static_cast<const int64_t*>(b)[j];
    case Type::kF64:
      return static_cast<const double*>(a)[i] == static_cast<const double*>(b)[j];
    default:  // float32 represents all values of these types
      return number_at<float>(a, type, i) == number_at<float>(b, type, j);
  }
}

template <class Stored>
constexpr Type kTypeOf = std::is_same_v<Stored, __half>          ? Type::kF16
                         : std::is_same_v<Stored, __nv_bfloat16> ? Type::kBF16
                         : std::is_same_v<Stored, float>         ? Type::kF32
                                                                 : Type::kF64;

// The bits of a label of 1.
template <class Bits>
__device__ Bits one_of(Type type) {
  switch (type) {
    case Type::kF16:
      return static_cast<Bits>(0x3c00);
    case Type::kBF16:
      return static_cast<Bits>(0x3f80);
    case Type::kF32:
      return static_cast<Bits>(0x3f800000);
    case Type::kF64:
      return static_cast<Bits>(0x3ff0000000000000);
    default:
      return 1;
  }
}

// A single store, which the compiler would otherwise split.
__device__ void store_vector(uint2* to, uint2 vector) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
               "r"(vector.x), "r"(vector.y)
               : "memory");
#else
  *to = vector;
#endif
}
__device__ void store_vector(uint4* to, uint4 vector) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w)
               : "memory");
#else
  *to = vector;
#endif
}

// The type of one transfer: 4, 8 or 16 bytes.
template <int kBytes>
struct Transfer {
  using Type =
      std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
};

// Four elements as stored: one transfer, or two.
template <class Stored>
struct Quad {
  static constexpr int kBytes = sizeof(Stored) * kQuad, kTransfers = kBytes > 16 ? 2 : 1;
  using Vector = typename Transfer<kBytes / kTransfers>::Type;
  Vector vectors[kTransfers];

  template <class Scalar>
  __device__ static Quad rounded(const Scalar* values) {
    Quad quad;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      Stored value;
      round_to(&value, values[c]);
      quad.set(c, value);
    }
    return quad;
  }
  __device__ static Quad load(const Stored* from) {
    Quad quad;
    BCE_UNROLL
    for (int i = 0; i < kTransfers; ++i)
      quad.vectors[i] = __ldg(reinterpret_cast<const Vector*>(from) + i);
    return quad;
  }
  __device__ void store(Stored* to) const {
    BCE_UNROLL
    for (int i = 0; i < kTransfers; ++i)
      store_vector(reinterpret_cast<Vector*>(to) + i, vectors[i]);
  }

  __device__ Stored get(int c) const {
    Stored value;
    memcpy(&value, reinterpret_cast<const char*>(vectors) + c * sizeof value, sizeof value);
    return value;
  }
  __device__ void set(int c, Stored value) {
    memcpy(reinterpret_cast<char*>(vectors) + c * sizeof value, &value, sizeof value);
  }
};

template <class Stored>
__device__ bool is_aligned(const Stored* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(typename Quad<Stored>::Vector) == 0;
}

// The first `left` of four elements, and padding for the rest, which is not read.
template <class Stored>
__device__ Quad<Stored> load(const Stored* from, bool broadcast, int left, Stored padding) {
  if (!broadcast && left >= kQuad && is_aligned(from)) return Quad<Stored>::load(from);
  Quad<Stored> quad;
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c) quad.set(c, c < left ? from[broadcast ? 0 : c] : padding);
  return quad;
}

template <class Stored, class Scalar>
__device__ void store_as(void* data, int64_t offset, int left, const Scalar* values) {
  Stored* to = static_cast<Stored*>(data) + offset;
  const auto quad = Quad<Stored>::rounded(values);
  if (left >= kQuad && is_aligned(to)) {
    quad.store(to);
    return;
  }
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c)
    if (c < left) to[c] = quad.get(c);
}

// Whether four labels are 0 or 1 (`one` is the bits of 1). Sets a sign bit for each 1, in two pairs
// of 16-bit numbers.
__device__ bool signs_of(const Quad<uint8_t>& labels, uint8_t, uint32_t* signs) {
  const uint32_t word = labels.vectors[0];
  signs[0] = __byte_perm(word << 7, 0, 0x1404);
  signs[1] = __byte_perm(word << 7, 0, 0x3424);
  return (word & 0xfefefefe) == 0;
}
template <class Bits>
__device__ bool signs_of(const Quad<Bits>& labels, Bits one, uint32_t* signs) {
  bool hard = true;
  BCE_UNROLL
  for (int p = 0; p < 2; ++p) {
    const Bits first = labels.get(2 * p), second = labels.get(2 * p + 1);
    hard = hard && (first == 0 || first == one) && (second == 0 || second == one);
    signs[p] = (first == one ? 0x8000 : 0) | (second == one ? 0x80000000 : 0);
  }
  return hard;
}

// The value of a result, to be multiplied by its factor and then rounded to its type.
template <class Scalar>
__device__ Scalar rounded_once(Pair<Scalar> value, Type type) {
  value = fast_two_sum(value.high, value.low);
  // As in bce_cpu_loop.h, bfloat16 does not need it.
  if (type == Type::kF16) value.high = round_to_odd<Lane<Scalar>>(value.high, value.low);
  return value.high;
}

template <class Scalar>
__device__ void store(const Result& result, int64_t offset, int left, const Scalar* values) {
  if constexpr (sizeof(Scalar) == 4) {
    if (result.type == Type::kF16) return store_as<__half>(result.data, offset, left, values);
    if (result.type == Type::kBF16)
      return store_as<__nv_bfloat16>(result.data, offset, left, values);
  }
  store_as<Scalar>(result.data, offset, left, values);
}

__device__ double fold(double number) {
  BCE_UNROLL
  for (int half = kWarp / 2; half > 0; half /= 2)
    number += __shfl_down_sync(0xffffffff, number, half);
  return number;
}

// The sum of the warps' numbers. Valid in the first thread of the thread block.
__device__ double sum_of_warps(double number) {
  __shared__ double numbers[kWarps];
  number = fold(number);
  if (threadIdx.x % kWarp == 0) numbers[threadIdx.x / kWarp] = number;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += numbers[warp];
  __syncthreads();  // before the next row overwrites the numbers
  return sum;
}

template <class Scalar>
__device__ void finish_row(const Problem& problem, int64_t row, const RowStart& start, double sum) {
  const double loss = problem.factor_at<Scalar>(start, 0).times(sum);
  if (problem.loss.type == Type::kF64)
    static_cast<double*>(problem.loss.data)[row] = loss;
  else
    static_cast<float*>(problem.loss.data)[row] = static_cast<float>(loss);
}

// Replaces the label type in a problem with modifiers, where labels may have any type.
struct Any {};

// One thread's share of a group, which starts at `begin` in the row.
template <class Logit, class Label>
class Share {
 public:
  using Scalar = decltype(convert(Logit()));

  __device__ Share(const Problem& problem, int64_t row, const RowStart& start, int64_t begin)
      : problem_(problem),
        row_(row),
        start_(start),
        factor_(problem.columns() ? factor_at(0) : Factor<Scalar>(0, 1)),
        rest_(factor_.rest),
        power_(static_cast<Scalar>(factor_.power)),
        smoothing_(problem.columns() ? smoothing_at(0) : 0),
        usual_(is_usual()) {
    const int lane = threadIdx.x % kWarp;
    const int first = lane / 8 * 256 + lane % 8 * kQuad, behind = (lane / 8 + 1) * 256;
    const int64_t rest = problem.columns() - begin;
    left_ = (rest < behind ? static_cast<int>(rest) : behind) - first;
    result_ = row * problem.columns() + begin + first;
    logits_ = static_cast<const Logit*>(problem.logits.data) + start.logits;
    labels_ = static_cast<const Label*>(problem.labels.data) + start.labels;
    if (!is_broadcast(problem.logits)) logits_ += begin + first;
    if (!is_broadcast(problem.labels)) labels_ += begin + first;
  }

  // Returns the sum of the elements if problem.reduce.
  __device__ double evaluate() {
    if (one_factor() && factor_.is_zero()) {
      const Scalar zeros[kQuad] = {};
#pragma unroll 1
      for (; left_ > 0; advance(32)) {
        if (with_loss() && !problem_.reduce) store(problem_.loss, result_, left_, zeros);
        if (with_gradient()) store(problem_.gradient, result_, left_, zeros);
      }
      return 0;
    }
    if constexpr (std::is_same_v<Label, Any>) {
#pragma unroll 1
      for (; left_ > 0; advance(32)) evaluate_modified();
    } else {
      if (is_plain()) evaluate_plain();
#pragma unroll 1
      for (; left_ > 0; advance(32)) evaluate_quad();
    }
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) high_[c] += low_[c];
    return (high_[0] + high_[2]) + (high_[1] + high_[3]);
  }

 private:
  using L = Lane<Scalar>;
  static constexpr bool kNarrow = sizeof(Logit) == 2;

  // The sign bits of four numbers, or of two pairs of 16-bit numbers.
  struct Signs {
    std::conditional_t<kNarrow, uint32_t, typename L::Bits> bits[kNarrow ? 2 : kQuad];
  };

  __device__ bool with_loss() const { return problem_.loss.data; }
  __device__ bool with_gradient() const { return problem_.gradient.data; }
  __device__ bool is_broadcast(const Operand& operand) const {
    return operand.strides[problem_.rank - 1] == 0;
  }
  __device__ bool one_factor() const {
    return is_broadcast(problem_.scale) && is_broadcast(problem_.divisor) &&
           is_broadcast(problem_.divisor_low);
  }
  __device__ Factor<Scalar> factor_at(int64_t i) const {
    return problem_.factor_at<Scalar>(start_, i);
  }
  __device__ Scalar smoothing_at(int64_t i) const {
    return static_cast<const Scalar*>(problem_.smoothing.data)[start_.smoothing + i];
  }
  __device__ void advance(int elements) {
    left_ -= elements;
    result_ += elements;
    if (!is_broadcast(problem_.logits)) logits_ += elements;
    if (!is_broadcast(problem_.labels)) labels_ += elements;
  }

  // Whether all elements share one factor and one smoothing, and results have the logits' type.
  __device__ bool is_usual() const {
    const auto fits = [](const Result& result) {
      return !result.data || result.type == kTypeOf<Logit>;
    };
    bool usual = one_factor() && power_ == 1 && is_broadcast(problem_.smoothing) &&
                 fits(problem_.gradient) && (problem_.reduce || fits(problem_.loss));
    if constexpr (kNarrow) {
      const Scalar divisor = magnitude_of<L>(L::reciprocal(rest_));
      usual = usual && divisor > 0x1p-60f && divisor < 0x1p60f;
    }
    return usual;
  }

  // Whether, in addition, only values of logits or labels can stop evaluate_plain, as in nearly
  // all training.
  __device__ bool is_plain() const {
    const auto fits = [&](const Result& result) {
      return !result.data || is_aligned(static_cast<Logit*>(result.data) + result_);
    };
    return usual_ && smoothing_ == 0 && !is_broadcast(problem_.logits) &&
           !is_broadcast(problem_.labels) && is_aligned(logits_) && is_aligned(labels_) &&
           fits(problem_.gradient) && (problem_.reduce || fits(problem_.loss));
  }

  // Evaluates quads as long as they are complete and in the common range, with labels 0 or 1.
  __device__ void evaluate_plain() {
    // Quads evaluated together while as many more are loaded: about 20 KiB per multiprocessor.
    constexpr bool kWide = sizeof(Logit) == 8 || sizeof(Label) == 8;
    constexpr int kQuads = kWide ? 1 : kNarrow ? 4 : 2;
    const Scalar divisor = L::reciprocal(rest_);
    const Label one = one_of<Label>(problem_.labels.type);
    constexpr int kStep = 32 * kQuads, kLast = kStep - 32 + kQuad;
    Quad<Logit> logits[kQuads];
    Quad<Label> labels[kQuads];
    const auto fetch = [&](int ahead) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        logits[q] = Quad<Logit>::load(logits_ + ahead + 32 * q);
        labels[q] = Quad<Label>::load(labels_ + ahead + 32 * q);
      }
    };
    if (left_ >= kLast) fetch(0);
#pragma unroll 1
    for (; left_ >= kLast; left_ -= kStep) {
      // A label of 1 is like 0 with the signs of logit and gradient flipped.
      Scalar z[kQuads][kQuad];
      Signs signs[kQuads];
      bool common = true;
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        common &= turn(logits[q], labels[q], one, z[q], &signs[q]);
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) common &= is_common(z[q][c]);
      }
      if (!common) return;
      // Load the next ones while these are evaluated.
      if (left_ >= kStep + kLast) fetch(kStep);
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        if constexpr (kNarrow)
          evaluate_narrow(z[q], signs[q], divisor, result_ + 32 * q);
        else
          evaluate_common(z[q], signs[q], result_ + 32 * q);
      }
      logits_ += kStep, labels_ += kStep, result_ += kStep;
    }
  }

  // Flips the signs of logits with a label of 1 (whose bits are `one`). False if a label is neither
  // 0 nor 1.
  __device__ static bool turn(const Quad<Logit>& logits, const Quad<Label>& labels, Label one,
                              Scalar* z, Signs* signs) {
    bool hard = true;
    if constexpr (kNarrow) {
      hard = signs_of(labels, one, signs->bits);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const uint32_t pair = c < 2 ? logits.vectors[0].x : logits.vectors[0].y;
        z[c] = convert_pair(Logit(), pair ^ signs->bits[c / 2], c % 2);
      }
    } else {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Label label = labels.get(c);
        hard &= label == 0 || label == one;
        signs->bits[c] = label == one ? sign_of<L>(-1) : 0;
        z[c] = L::from_bits(L::to_bits(convert(logits.get(c))) ^ signs->bits[c]);
      }
    }
    return hard;
  }

  __device__ void evaluate_common(const Scalar* z, const Signs& signs, int64_t result) {
    const Scalar zeros[kQuad] = {};
    Scalar factors[kQuad], turned[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      factors[c] = rest_;
      turned[c] = L::from_bits(L::to_bits(rest_) ^ signs.bits[c]);
    }
    evaluate_wide<true, false, kQuad>(0, z, zeros, zeros, factors, turned,
                                      [&](const Result& to, const Scalar* values) {
                                        store_plain(to, result, Quad<Logit>::rounded(values));
                                      });
  }

  __device__ static bool is_common(Scalar x) {
    return magnitude_of<L>(x) <= Format<Scalar>::kCommon;
  }

  __device__ void evaluate_narrow(const Scalar* z, const Signs& signs, Scalar divisor,
                                  int64_t result) {
    Narrow<L> narrow[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) narrow[c] = narrow_of<L>(z[c]);
    if (with_loss() && problem_.reduce) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) add(c, narrow[c], L::max(z[c], 0));
    } else if (with_loss()) {
      const auto loss = [&](int c) {
        return rest_ *
               L::fma(2, narrow[c].half_log1p.high + narrow[c].half_log1p.low, L::max(z[c], 0));
      };
      store_plain(problem_.loss, result,
                  {{{bits_of(loss(0), loss(1)), bits_of(loss(2), loss(3))}}});
    }
    if (with_gradient()) {
      const auto gradient = [&](int c) { return hard_gradient_of<L>(z[c], narrow[c].e, divisor); };
      store_plain(problem_.gradient, result,
                  {{{signs.bits[0] ^ bits_of(gradient(0), gradient(1)),
                     signs.bits[1] ^ bits_of(gradient(2), gradient(3))}}});
    }
  }

  __device__ void add(int c, const Narrow<L>& narrow, double linear) {
    high_[c] = ::fma(2.0, static_cast<double>(narrow.half_log1p.high), high_[c]) + linear;
    low_[c] = L::fma(2, narrow.half_log1p.low, low_[c]);
  }

  __device__ static void store_plain(const Result& result, int64_t offset,
                                     const Quad<Logit>& quad) {
    quad.store(static_cast<Logit*>(result.data) + offset);
  }

  __device__ static uint32_t bits_of(Scalar a, Scalar b) {
    const auto pair = round_pair(Logit(), a, b);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }

  // The next four elements, or as many as are left, of any kind.
  __device__ void evaluate_quad() {
    // The padding, with label 0 and no smoothing, has a loss of exactly 0.
    Logit minus_infinity;
    round_to(&minus_infinity, -Format<Scalar>::kInfinity);
    const auto logits = load(logits_, is_broadcast(problem_.logits), left_, minus_infinity);
    const auto labels = load(labels_, is_broadcast(problem_.labels), left_, Label(0));
    const int64_t column = result_ - row_ * problem_.columns();
    Scalar x[kQuad], y[kQuad], smoothing[kQuad], factor[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      x[c] = convert(logits.get(c));
      y[c] = label_of<Scalar>(problem_.labels.type, labels.get(c));
      smoothing[c] = c < left_ ? smoothing_ : 0;
      factor[c] = rest_;
      if (c < left_ && !is_broadcast(problem_.smoothing)) smoothing[c] = smoothing_at(column + c);
    }
    if constexpr (kNarrow) {
      Scalar loss[kQuad] = {}, gradient[kQuad] = {};
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const auto keep = [&](const Result& result, const Scalar* value) {
          (&result == &problem_.loss ? loss : gradient)[c] = *value;
        };
        // Chosen by the element's own value, so that its bits do not depend on its neighbors.
        if (usual_ && is_common(x[c]) && y[c] >= 0 && y[c] <= 1)
          evaluate_soft(c, x[c], y[c], keep);
        else
          evaluate_wide<false, false, 1>(c, x + c, y + c, smoothing + c, factor + c, factor + c,
                                         keep);
      }
      store_results(loss, gradient);
    } else {
      evaluate_wide<false, false, kQuad>(0, x, y, smoothing, factor, factor,
                                         [&](const Result& result, const Scalar* values) {
                                           store(result, result_, left_, values);
                                         });
    }
  }

  __device__ void store_results(const Scalar* loss, const Scalar* gradient) {
    if (with_loss() && !problem_.reduce) store(problem_.loss, result_, left_, loss);
    if (with_gradient()) store(problem_.gradient, result_, left_, gradient);
  }

  // The next four elements, or as many as are left, with their modifiers.
  __device__ void evaluate_modified() {
    const auto logits = load(logits_, is_broadcast(problem_.logits), left_, Logit());
    const int64_t column = result_ - row_ * problem_.columns();
    Scalar loss[kQuad] = {}, gradient[kQuad] = {};
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      if (c < left_)
        evaluate_modified(c, convert(logits.get(c)), column + c,
                          [&](const Result& result, const Scalar* value) {
                            (&result == &problem_.loss ? loss : gradient)[c] = *value;
                          });
    }
    store_results(loss, gradient);
  }

  // One of them. A masked element is replaced by a harmless one.
  template <class Keep>
  __device__ void evaluate_modified(int c, Scalar x, int64_t column, const Keep& keep) {
    const int64_t element = result_ + c;
    const auto given = [&](ModifierName name) { return problem_.modifiers[name].data != nullptr; };
    const auto number = [&](ModifierName name) {
      const Modifier& modifier = problem_.modifiers[name];
      return given(name) ? number_at<Scalar>(modifier.data, modifier.type, modifier.offset(element))
                         : Scalar(1);
    };
    const Operand& labels = problem_.labels;
    const int64_t label = start_.labels + (is_broadcast(labels) ? 0 : column);
    Scalar y = number_at<Scalar>(labels.data, labels.type, label);
    const Factor<Scalar> factor = one_factor() ? factor_ : factor_at(column);
    bool exists = !factor.is_zero() && number(kWhere) != 0;
    if (const Modifier& ignored = problem_.modifiers[kIgnoreLabel]; ignored.data)
      exists = exists &&
               !same_number(labels.type, labels.data, label, ignored.data, ignored.offset(element));
    Pair<Scalar> weight = {0, 0};
    Scalar pos_weight = 1;
    if (exists) {
      weight = product_of<L>({number(kWeight), 0}, {number(kSampleWeight), 0});
      pos_weight = number(kPosWeight);
    } else {
      x = y = 0;
    }
    const Scalar smoothing = is_broadcast(problem_.smoothing) ? smoothing_ : smoothing_at(column);
    const Scalar power = static_cast<Scalar>(factor.power);
    weight = {weight.high * power, weight.low * power};
    if (problem_.total) {
      weight = finite_low<L>(weight);
      high_[c] += weight.high;
      low_[c] += weight.low;
      return;
    }
    const Weight<Scalar> own = weight_of<L>(weight, pos_weight, y, smoothing);
    // A NaN or negative factor would show in the result of a masked element.
    const Scalar rest = exists ? factor.rest : 0;
    evaluate_wide<false, true, 1>(c, &x, &y, &smoothing, &rest, &rest, keep, own);
  }

  // For a label of 0 or 1, gives the same bits as evaluate_narrow.
  template <class Keep>
  __device__ void evaluate_soft(int c, Scalar x, Scalar y, const Keep& keep) {
    const Narrow<L> narrow = narrow_of<L>(x);
    if (with_loss()) {
      const double linear = soft_coefficient_of<double>(x, y, smoothing_) * ::fabs(x);
      if (problem_.reduce) {
        add(c, narrow, linear);
      } else {
        const Scalar loss = rest_ * L::fma(2, narrow.half_log1p.high + narrow.half_log1p.low,
                                           static_cast<Scalar>(linear));
        keep(problem_.loss, &loss);
      }
    }
    if (with_gradient()) {
      const Scalar coefficient = soft_coefficient_of<Scalar>(x, y, smoothing_);
      const Scalar gradient = soft_gradient_of<L>(x, coefficient, narrow.e, L::reciprocal(rest_));
      keep(problem_.gradient, &gradient);
    }
  }

  // Evaluates the elements of the lanes from `lane` on. A gradient has the factor of its loss,
  // negated if a label flipped the logit.
  template <bool kCommon, bool kModified, int kCount, class Keep>
  __device__ void evaluate_wide(int lane, const Scalar* x, const Scalar* y, const Scalar* smoothing,
                                const Scalar* factor, const Scalar* gradient_factor,
                                const Keep& keep, Weight<Scalar> weight = {}) {
    const auto times_factor = [&](Scalar value, Scalar factor) {
      if constexpr (kModified) value = weighted<L>({value, 0}, weight.weight.high).high;
      if constexpr (!kCommon && !kModified) value *= power_;
      return value * factor;
    };
    Exponential<L> exponential[kCount];
    Scalar values[kCount];
    BCE_UNROLL
    for (int c = 0; c < kCount; ++c) exponential[c] = exp_of<L, kCommon>(x[c]);
    if (with_loss()) {
      Pair<Scalar> pairs[kCount];
      BCE_UNROLL
      for (int c = 0; c < kCount; ++c)
        pairs[c] = loss_of<L, kCommon, kModified>(x[c], y[c], smoothing[c], exponential[c],
                                                  weight.pos_weight);
      if (problem_.reduce) {
        BCE_UNROLL
        for (int c = 0; c < kCount; ++c) {
          if constexpr (kModified) pairs[c] = weighted<L>(pairs[c], weight.weight);
          if constexpr (!kCommon && !kModified)
            pairs[c] = {pairs[c].high * power_, pairs[c].low * power_};
          high_[lane + c] += pairs[c].high;
          low_[lane + c] += pairs[c].low;
        }
      } else {
        BCE_UNROLL
        for (int c = 0; c < kCount; ++c)
          values[c] = times_factor(
              rounded_once(pairs[c], kCommon ? kTypeOf<Logit> : problem_.loss.type), factor[c]);
        keep(problem_.loss, values);
      }
    }
    if (with_gradient()) {
      BCE_UNROLL
      for (int c = 0; c < kCount; ++c)
        values[c] = times_factor(
            rounded_once(gradient_of<L, kCommon, kModified>(x[c], y[c], smoothing[c],
                                                            exponential[c], weight.pos_weight),
                         kCommon ? kTypeOf<Logit> : problem_.gradient.type),
            gradient_factor[c]);
      keep(problem_.gradient, values);
    }
  }

  const Problem& problem_;
  const int64_t row_;
  const RowStart& start_;
  const Factor<Scalar> factor_;  // this and the next members are for the row's first element
  const Scalar rest_, power_, smoothing_;
  const bool usual_;
  // The remaining work: how many elements, where they are (if not broadcast), where results go.
  int left_;
  const Logit* logits_;
  const Label* labels_;
  int64_t result_;
  double high_[kQuad] = {};
  Scalar low_[kQuad] = {};
};

// Thread blocks per multiprocessor: as many as still keep all variables in registers.
template <class Logit>
constexpr int kBlocksAtOnce = sizeof(Logit) == 8 ? 1 : 2;

// Rows of at most one group: one warp per row.
template <class Logit, class Label>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Logit>)
    short_rows(const Problem problem) {
  const int64_t rows = problem.rows();
  const int64_t first = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  for (int64_t row = first; row < rows; row += gridDim.x * int64_t{kWarps}) {
    const RowStart start = problem.row_start(row);
    const double sum = Share<Logit, Label>(problem, row, start, 0).evaluate();
    if (!problem.reduce) continue;
    const double total = fold(sum);
    if (threadIdx.x % kWarp == 0)
      finish_row<decltype(convert(Logit()))>(problem, row, start, total);
  }
}

// Longer rows: one thread block per block.
template <class Logit, class Label>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Logit>)
    long_rows(const Problem problem, double* workspace) {
  const int64_t rows = problem.rows();
  const int64_t begin = blockIdx.x * kBlock + threadIdx.x / kWarp * kGroup;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const RowStart start = problem.row_start(row);
    const double sum =
        begin < problem.columns() ? Share<Logit, Label>(problem, row, start, begin).evaluate() : 0;
    if (!problem.reduce) continue;
    const double total = sum_of_warps(sum);
    if (threadIdx.x != 0) continue;
    if (gridDim.x == 1)
      finish_row<decltype(convert(Logit()))>(problem, row, start, total);
    else
      workspace[row * gridDim.x + blockIdx.x] = total;
  }
}

// Adds up the blocks of each row.
template <class Scalar>
__global__ void __launch_bounds__(kThreads)
    sum_of_blocks(const Problem problem, const double* workspace, int64_t blocks) {
  const int64_t rows = problem.rows();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += kThreads)
      sum += workspace[row * blocks + block];
    sum = sum_of_warps(sum);
    if (threadIdx.x == 0) finish_row<Scalar>(problem, row, problem.row_start(row), sum);
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t width, int64_t height,
                   CUstream_st* stream, const Arguments&... arguments) {
  // Rows beyond the largest grid are handled by the kernels' loops over rows.
  constexpr int64_t kMaxWidth = 0x7fffffff, kMaxHeight = 0xffff;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(width < kMaxWidth ? width : kMaxWidth),
                        static_cast<unsigned>(height < kMaxHeight ? height : kMaxHeight));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Logit, class Label>
cudaError_t launch_for(const Problem& problem, double* workspace, CUstream_st* stream) {
  const int64_t rows = problem.rows(), columns = problem.columns();
  if (columns <= kGroup)
    return launch(short_rows<Logit, Label>, (rows + kWarps - 1) / kWarps, 1, stream, problem);
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  const cudaError_t error =
      launch(long_rows<Logit, Label>, blocks, rows, stream, problem, workspace);
  if (error != cudaSuccess || !problem.reduce || blocks == 1) return error;
  using Scalar = decltype(convert(Logit()));
  return launch(sum_of_blocks<Scalar>, rows, 1, stream, problem, workspace, blocks);
}

template <class Logit>
cudaError_t launch_for(const Problem& problem, double* workspace, CUstream_st* stream) {
  const int last = problem.rank - 1;
  if (problem.modified || problem.total || problem.scale.strides[last] != 0 ||
      problem.divisor.strides[last] != 0 || problem.divisor_low.strides[last] != 0)
    return launch_for<Logit, Any>(problem, workspace, stream);
  switch (problem.labels.type) {
    case Type::kBool:
    case Type::kI8:
    case Type::kU8:
      return launch_for<Logit, uint8_t>(problem, workspace, stream);
    case Type::kF16:
    case Type::kBF16:
    case Type::kI16:
      return launch_for<Logit, uint16_t>(problem, workspace, stream);
    case Type::kF32:
    case Type::kI32:
      return launch_for<Logit, uint32_t>(problem, workspace, stream);
    case Type::kF64:
    case Type::kI64:
      break;
  }
  return launch_for<Logit, uint64_t>(problem, workspace, stream);
}

cudaError_t launch_for(const Problem& problem, double* workspace, CUstream_st* stream) {
  switch (problem.logits.type) {
    case Type::kF16:
      return launch_for<__half>(problem, workspace, stream);
    case Type::kBF16:
      return launch_for<__nv_bfloat16>(problem, workspace, stream);
    case Type::kF64:
      return launch_for<double>(problem, workspace, stream);
    default:
      return launch_for<float>(problem, workspace, stream);
  }
}

}  // namespace

const char* bce_cuda(const Problem& problem, double* workspace, CUstream_st* stream) {
  if (problem.rows() == 0 || (problem.columns() == 0 && !problem.reduce)) return nullptr;
  const cudaError_t error = launch_for(problem, workspace, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_zero(double* numbers, int64_t count, CUstream_st* stream) {
  const cudaError_t error = cudaMemsetAsync(numbers, 0, count * sizeof *numbers, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_runtime_version() { return CUDART_VERSION; }

std::vector<int> cuda_compute_capabilities() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<int> capabilities;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
      capabilities.push_back(10 * major + minor);
  }
  return capabilities;
}

}  // namespace jax_bce
