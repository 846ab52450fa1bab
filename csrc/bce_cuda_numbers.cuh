// Numbers as a GPU stores and computes them: an element at a time, converted from and to each type,
// four elements in one transfer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "bce_math.h"
#include "bce_problem.h"

// Where a GPU approximates. A test may replace these two by others, as far off as a GPU may be.
#ifndef BCE_EXP2_ON_HOST
#define BCE_EXP2_ON_HOST(b) ::exp2(b)
#define BCE_RECIPROCAL_ON_HOST(b) (1 / (b))
#endif

namespace jax_bce {
namespace {

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
  static BCE_INLINE T magnitude(T value) { return ::fabs(value); }

  // Within an ulp in float32. Subnormal results may be flushed to 0.
  static BCE_INLINE T reciprocal(T b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) {
      asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(b));
      return b;
    }
#endif
    return BCE_RECIPROCAL_ON_HOST(b);
  }

  static BCE_INLINE T ratio(T a, T b) { return a * reciprocal(b); }

  // 2^b. In float32 within two ulp, and 0 where the result would be subnormal.
  static BCE_INLINE T exp2(T b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) {
      asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(b));
      return b;
    }
#endif
    return BCE_EXP2_ON_HOST(b);
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

// Whether all numbers of some pairs, of either type, are at most `limit` in magnitude. Magnitudes
// have the order of their bits, with NaN at its end.
__device__ uint32_t with_pair(uint32_t largest, uint32_t pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("{ .reg .b32 magnitudes; abs.bf16x2 magnitudes, %1;\n"
      "max.NaN.bf16x2 %0, %0, magnitudes; }"  // one instruction
      : "+r"(largest)
      : "r"(pair));
  return largest;
#else
  const uint32_t first = pair & 0x7fff, second = pair & 0x7fff0000;
  const uint32_t low = largest & 0xffff, high = largest & 0xffff0000;
  return (first > low ? first : low) | (second > high ? second : high);
#endif
}
__device__ bool all_within(uint32_t largest, uint32_t limit) {
  return largest <= (limit << 16 | 0xffff) && (largest & 0xffff) <= limit;
}
template <class Stored>
__device__ uint32_t bits_of(float number) {
  Stored rounded;
  round_to(&rounded, number);
  uint16_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

// The first bit of each byte that is not 0.
BCE_INLINE uint32_t nonzero_bytes(uint32_t word) {
  return (((word & 0x7f7f7f7f) + 0x7f7f7f7f) | word) & 0x80808080;
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

// Replaces the type of numbers that may have any. Of logits, one with arithmetic in float32; those
// of 16 bits are also read as they are, as uint16_t.
struct Any {};

template <class Logit>
using ScalarOf = std::conditional_t<std::is_same_v<Logit, double>, double, float>;

template <class Stored>
constexpr Type kTypeOf = std::is_same_v<Stored, __half>          ? Type::kF16
                         : std::is_same_v<Stored, __nv_bfloat16> ? Type::kBF16
                         : std::is_same_v<Stored, float>         ? Type::kF32
                                                                 : Type::kF64;

// Keeps the compiler from computing a number again from its operands, which would then have to stay
// in registers, too.
__device__ float in_register(float number) {
#ifdef __CUDA_ARCH__
  asm("" : "+f"(number));
#endif
  return number;
}
__device__ uint32_t in_register(uint32_t number) {
#ifdef __CUDA_ARCH__
  asm("" : "+r"(number));
#endif
  return number;
}
__device__ double in_register(double number) { return number; }
template <class T>
__device__ T* in_register(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// A single store, which the compiler would otherwise split, or none. Without a branch: what
// contains one that may diverge takes two more instructions.
__device__ void store_vector(uint2* to, uint2 vector, bool wanted) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "{ .reg .pred wanted; setp.ne.b32 wanted, %3, 0;\n"
      "@wanted st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(__cvta_generic_to_global(to)),
      "r"(vector.x), "r"(vector.y), "r"(static_cast<int>(wanted))
      : "memory");
#else
  if (wanted) *to = vector;
#endif
}
__device__ void store_vector(uint4* to, uint4 vector, bool wanted) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "{ .reg .pred wanted; setp.ne.b32 wanted, %5, 0;\n"
      "@wanted st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(__cvta_generic_to_global(to)),
      "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w), "r"(static_cast<int>(wanted))
      : "memory");
#else
  if (wanted) *to = vector;
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
  __device__ static Quad load(const Stored* from, bool aligned) {
    Quad quad;
    if (!aligned) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) quad.set(c, __ldcs(from + c));
      return quad;
    }
    BCE_UNROLL
    for (int i = 0; i < kTransfers; ++i)
      quad.vectors[i] = __ldcs(reinterpret_cast<const Vector*>(from) + i);
    return quad;
  }
  __device__ void store(Stored* to, bool wanted = true) const {
    BCE_UNROLL
    for (int i = 0; i < kTransfers; ++i)
      store_vector(reinterpret_cast<Vector*>(to) + i, vectors[i], wanted);
  }
  __device__ void store_each(Stored* to, bool wanted) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c)
      if (wanted) to[c] = get(c);
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

// Whether so many bytes may be loaded or stored there at once.
BCE_INLINE bool is_aligned(const void* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % (bytes < 16 ? bytes : 16) == 0;
}

BCE_INLINE int width_of(Type type) {
  constexpr uint64_t kWidths = 0x8421118422;  // a digit a type
  return kWidths >> 4 * static_cast<int>(type) & 0xf;
}

// Four numbers of any type whose width is one of kWidths, a sum of 1, 2, 4 and 8: as stored if they
// fit, else as Scalars.
template <class Scalar, int kWidths, bool kFloats = false>
struct AnyQuad {
  uint4 words[sizeof(Scalar) / 4];

  // Loads quads that are 32 elements apart, with one decision for all.
  template <int kQuads>
  __device__ static void load(AnyQuad (&quads)[kQuads], Type type, int width, const void* data,
                              bool aligned) {
    const auto vector = [&](auto vector, int q) {
      return __ldcs(reinterpret_cast<const decltype(vector)*>(static_cast<const char*>(data) +
                                                              32 / kQuad * sizeof vector * q));
    };
    if (!aligned || is<8>(width)) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        quads[q] = {};
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) quads[q].set(c, type, data, 32 * q + c);
      }
    } else if (is<4>(width)) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) quads[q].words[0] = vector(uint4(), q);
    } else if (is<2>(width)) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        const uint2 two = vector(uint2(), q);
        quads[q].words[0].x = two.x, quads[q].words[0].y = two.y;
      }
    } else {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) quads[q].words[0].x = vector(uint32_t(), q);
    }
  }
  // Four times the same number.
  __device__ static AnyQuad filled(Type type, const void* data) {
    AnyQuad quad = {};
    quad.set(0, type, data, 0);
    constexpr int kWords = sizeof(Scalar) / 4;
    const int width = width_of(type);
    const uint32_t word = quad.word(0) * (is<1>(width) ? 0x1010101 : is<2>(width) ? 0x10001 : 1);
    const uint32_t odd = kWords == 2 && is<8>(width) ? quad.word(1) : word;
    BCE_UNROLL
    for (int i = 0; i < kWords * kQuad; ++i) quad.word(i) = i % 2 ? odd : word;
    return quad;
  }
  __device__ void set(int c, Type type, const void* data, int64_t i) {
    const int width = width_of(type);
    if (is<4>(width)) {
      word(c) = static_cast<const uint32_t*>(data)[i];
    } else if (is<2>(width)) {
      word(c / 2) |= uint32_t{static_cast<const uint16_t*>(data)[i]} << 16 * (c % 2);
    } else if (is<1>(width)) {
      word(0) |= uint32_t{static_cast<const uint8_t*>(data)[i]} << 8 * c;
    } else {
      const auto bits = Lane<Scalar>::to_bits(number_at<Scalar>(data, type, i));
      constexpr int kWords = sizeof bits / 4;
      BCE_UNROLL
      for (int i = 0; i < kWords; ++i)
        word(c * kWords + i) = static_cast<uint32_t>(uint64_t{bits} >> 32 * i);
    }
  }
  __device__ uint32_t& word(int i) {
    uint4& four = words[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  }
  __device__ uint32_t word(int i) const { return const_cast<AnyQuad*>(this)->word(i); }

  // Visits the numbers of quads, with one decision for all: visit(quad, place in it, number,
  // whether it is of type int32).
  template <int kQuads, class Visit>
  __device__ static void each(const AnyQuad (&quads)[kQuads], Type type, int width,
                              const Visit& visit) {
    const auto all = [&](auto is_int32, const auto& number) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) visit(q, c, number(quads[q], c), is_int32);
      }
    };
    const std::true_type yes;
    const std::false_type no;
    const auto half = [](const AnyQuad& quad, int c) {
      return static_cast<uint16_t>(quad.word(c / 2) >> 16 * (c % 2));
    };
    if (is<4>(width)) {
      if (kFloats || type == Type::kF32)
        all(no, [](auto& quad, int c) { return label_of<Scalar>(Type::kF32, quad.word(c)); });
      else
        all(yes, [](auto& quad, int c) { return label_of<Scalar>(Type::kI32, quad.word(c)); });
    } else if (is<2>(width)) {
      if (type == Type::kBF16)
        all(no, [&](auto& quad, int c) { return label_of<Scalar>(Type::kBF16, half(quad, c)); });
      else if (kFloats || type == Type::kF16)
        all(no, [&](auto& quad, int c) { return label_of<Scalar>(Type::kF16, half(quad, c)); });
      else
        all(no, [&](auto& quad, int c) { return label_of<Scalar>(Type::kI16, half(quad, c)); });
    } else if (is<1>(width)) {
      all(no, [&](auto& quad, int c) {
        return label_of<Scalar>(type, static_cast<uint8_t>(quad.word(0) >> 8 * c));
      });
    } else {
      all(no, [](auto& quad, int c) -> Scalar {
        if constexpr (sizeof(Scalar) == 4) return __uint_as_float(quad.word(c));
        return Lane<Scalar>::from_bits(uint64_t{quad.word(2 * c + 1)} << 32 | quad.word(2 * c));
      });
    }
  }

 private:
  template <int kWidth>
  __device__ static bool is(int width) {
    return (kWidths & kWidth) && (kWidths == kWidth || width == kWidth);
  }
};

// The value of a result, to be multiplied by its factor and then rounded to its type.
template <class Scalar>
__device__ Scalar rounded_once(Pair<Scalar> value, Type type) {
  value = fast_two_sum(value.high, value.low);
  // As in bce_cpu.cc, bfloat16 does not need it.
  if (type == Type::kF16) value.high = round_to_odd<Lane<Scalar>>(value.high, value.low);
  return value.high;
}

// The same of a quad, with one decision for all.
template <class Scalar>
__device__ void round_once(const Pair<Scalar>* pairs, Type type, Scalar* values) {
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c) values[c] = fast_two_sum(pairs[c].high, pairs[c].low).high;
  if (type != Type::kF16) return;
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c) values[c] = rounded_once(pairs[c], type);
}

template <class Scalar>
__device__ void store(const Result& result, int64_t place, Scalar value) {
  const auto store_as = [&](auto stored) {
    round_to(&stored, value);
    static_cast<decltype(stored)*>(result.data)[place] = stored;
  };
  if constexpr (sizeof(Scalar) == 4) {
    if (result.type == Type::kF16) return store_as(__half());
    if (result.type == Type::kBF16) return store_as(__nv_bfloat16());
  }
  store_as(Scalar());
}

}  // namespace
}  // namespace jax_bce
