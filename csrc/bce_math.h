// THE formulas, once, for every lane type: a host SIMD vector, a host scalar, a CUDA thread.
//
// One element of binary cross-entropy with logit x and label y,
//     loss     = (1 - y) log(1 + exp(x)) + y log(1 + exp(-x))
//     gradient = d loss / dx = (1 - y) sigmoid(x) - y sigmoid(-x),
// comes from e = exp(-|x|) alone, without cancellation:
//     loss     = log1p(e) + c |x|
//     gradient = sign(x) (c - e / (1 + e)),    c = x >= 0 ? 1 - y : y.
//
// The accuracy contract (tests/oracle.py holds the same numbers):
//     float32, labels 0 and 1   <= 1 ulp for loss and gradient, on every one of the 2^32 logits
//     float32, labels in (0,1)  loss <= 2 ulp; gradient error <= 1 ulp of
//                               max((1 - y) sigmoid(x), y sigmoid(-x))
//     float64                   <= 4 ulp
//     infinities, NaN, tails    the limit; NaN; gradual underflow
// To keep it, every value whose rounding error would show is a pair: x and, below it, x_low.
//
// Only + - * fma / select and integer operations are used, in a written order, with contraction off
// in every compiler: each lane type gives the same bits.
//
// A Lanes class names Scalar (float or double), Float (its lanes), Bits (unsigned, as wide), and
// has set, fma, select, min (a < b ? a : b), max (a > b ? a : b), to_bits and from_bits.
#pragma once

#ifdef __CUDACC__
#define BCE_INLINE __host__ __device__ __forceinline__
#define BCE_UNROLL _Pragma("unroll")
#else
#define BCE_UNROLL _Pragma("GCC unroll 16")
#define BCE_INLINE inline __attribute__((always_inline))
#endif

namespace jax_bce {

// c0 + c1 x + c2 x^2 + ..., in pairs (Estrin): a shorter chain of operations than Horner's.
template <class Lanes, int kCount>
BCE_INLINE typename Lanes::Float estrin(const typename Lanes::Float (&terms)[kCount],
                                        typename Lanes::Float x) {
  if constexpr (kCount == 1) {
    return terms[0];
  } else {
    typename Lanes::Float pairs[(kCount + 1) / 2];
    BCE_UNROLL
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = Lanes::fma(terms[2 * i + 1], x, terms[2 * i]);
    if constexpr (kCount % 2) pairs[kCount / 2] = terms[kCount - 1];
    return estrin<Lanes>(pairs, x * x);
  }
}

template <class Lanes, class... Coefficients>
BCE_INLINE typename Lanes::Float polynomial(typename Lanes::Float x, Coefficients... coefficients) {
  const typename Lanes::Float terms[] = {Lanes::set(coefficients)...};
  return estrin<Lanes>(terms, x);
}

// What depends on the floating-point format. coefficients.sollya prints the polynomials.
template <class Scalar>
struct Format;

template <>
struct Format<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kExponentBias = 127;
  static constexpr float kRound =
      0x1.8p23f;  // x + kRound holds the nearest integer in its low bits
  static constexpr float kInfinity = __builtin_huge_valf();
  static constexpr float kUnderflow = 105;     // exp(-105) rounds to zero
  static constexpr float kTinyExponent = -64;  // below 2^-64, log1p(e) = e / (1 + e) = e
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // k * high is exact

  // (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2, to a relative 2^-31 of exp(r)
  template <class Lanes>
  static BCE_INLINE typename Lanes::Float exp_tail(typename Lanes::Float r) {
    return polynomial<Lanes>(r, 0x1p-1f, 0x1.555556p-3f, 0x1.555502p-5f, 0x1.110fc2p-7f,
                             0x1.6d2e06p-10f, 0x1.a2d99ap-13f);
  }

  // (log1p(f) - f + f^2 / 2) / f^3 for -1/4 <= f <= 1/2, to a relative 2^-28 of log1p(f)
  template <class Lanes>
  static BCE_INLINE typename Lanes::Float log1p_tail(typename Lanes::Float f) {
    return polynomial<Lanes>(f, 0x1.555554p-2f, -0x1.00004ap-2f, 0x1.999b3ep-3f, -0x1.552a58p-3f,
                             0x1.2414a2p-3f, -0x1.03532ap-3f, 0x1.e1a294p-4f, -0x1.8833cap-4f,
                             0x1.5924d6p-5f);
  }
};

template <>
struct Format<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kExponentBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kInfinity = __builtin_huge_val();
  static constexpr double kUnderflow = 750;
  static constexpr double kTinyExponent = -200;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;

  template <class Lanes>
  static BCE_INLINE typename Lanes::Float exp_tail(typename Lanes::Float r) {
    return polynomial<Lanes>(r, 0x1p-1, 0x1.5555555555555p-3, 0x1.5555555555556p-5,
                             0x1.111111111137fp-7, 0x1.6c16c16c15ff9p-10, 0x1.a01a019ea7c8ep-13,
                             0x1.a01a01a81960bp-16, 0x1.71de405d63ca9p-19, 0x1.27e4d815531e4p-22,
                             0x1.ae4d6d6175864p-26, 0x1.1f78e74065839p-29, 0x1.81cbfb8d3b654p-33);
  }

  template <class Lanes>
  static BCE_INLINE typename Lanes::Float log1p_tail(typename Lanes::Float f) {
    return polynomial<Lanes>(
        f, 0x1.555555555554ep-2, -0x1.000000000004dp-2, 0x1.999999999bb5fp-3, -0x1.555555554ab83p-3,
        0x1.249249231577bp-3, -0x1.00000002dac8cp-3, 0x1.c71c72be1ea67p-4, -0x1.999999d3cf455p-4,
        0x1.745ced243b19ap-4, -0x1.5555049dcd13bp-4, 0x1.3b177ecbe82e4p-4, -0x1.249fd27c03b7fp-4,
        0x1.10eabdbc11e1ap-4, -0x1.fe06cce11c902p-5, 0x1.e146b2f279f84p-5, -0x1.d6911d8e32164p-5,
        0x1.d1d865ef238a2p-5, -0x1.9034f0583b2dp-5, 0x1.d4ae44717f4fep-6, -0x1.040a91e799a7bp-7);
  }
};

template <class Lanes>
struct Element {
  typename Lanes::Float loss, loss_low;          // loss is rounded; loss_low is what that lost, for
  typename Lanes::Float gradient, gradient_low;  // sums and for a second rounding
};

// A number and what its rounding lost.
template <class Float>
struct Pair {
  Float high, low;
};

// a + b where |a| >= |b| or a = 0 (Dekker).
template <class Float>
BCE_INLINE Pair<Float> fast_two_sum(Float a, Float b) {
  const Float sum = a + b;
  return {sum, b - (sum - a)};
}

// a + b (Knuth).
template <class Float>
BCE_INLINE Pair<Float> two_sum(Float a, Float b) {
  const Float sum = a + b, b_part = sum - a;
  return {sum, (a - (sum - b_part)) + (b - b_part)};
}

// high + low rounded to odd: rounded again, to half as many digits, it gives what one rounding of
// the sum gives. A low that is not a number changes nothing.
template <class Lanes>
BCE_INLINE typename Lanes::Float round_to_odd(typename Lanes::Float high,
                                              typename Lanes::Float low) {
  constexpr int kSignBit = 8 * sizeof(typename Lanes::Scalar) - 1;
  const typename Lanes::Bits bits = Lanes::to_bits(high);
  const typename Lanes::Float zero = Lanes::set(0);
  const typename Lanes::Float outward =
      Lanes::from_bits(Lanes::to_bits(low) ^ (bits >> kSignBit << kSignBit));
  return Lanes::select(outward > zero, Lanes::from_bits(bits | 1),
                       Lanes::select(outward < zero, Lanes::from_bits((bits - 1) | 1), high));
}

template <class Lanes>
BCE_INLINE Element<Lanes> binary_cross_entropy(typename Lanes::Float logit,
                                               typename Lanes::Float label) {
  using Scalar = typename Lanes::Scalar;
  using Float = typename Lanes::Float;
  using Bits = typename Lanes::Bits;
  using F = Format<Scalar>;
  const Float zero = Lanes::set(0), one = Lanes::set(1), half = Lanes::set(Scalar(0.5));
  constexpr int kSignBit = 8 * sizeof(Scalar) - 1;

  const Bits sign = Lanes::to_bits(logit) >> kSignBit << kSignBit;
  const Float magnitude = Lanes::from_bits(Lanes::to_bits(logit) ^ sign);

  // exp(-|x|) = 2^exponent (1 + s). In biased the exponent, biased, stands in the lowest bits.
  const Float a = Lanes::min(Lanes::set(F::kUnderflow), magnitude);
  const Float round = Lanes::set(F::kRound + F::kExponentBias);
  const Float biased = Lanes::fma(a, Lanes::set(Scalar(-1.4426950408889634)), round);
  const Float exponent = biased - round;
  const Float r_high = Lanes::fma(exponent, Lanes::set(-F::kLn2High), -a);
  const Float r = Lanes::fma(exponent, Lanes::set(-F::kLn2Low), r_high);
  const Float r_low = Lanes::fma(exponent, Lanes::set(-F::kLn2Low), r_high - r);
  const Float s = Lanes::fma(r * r, F::template exp_tail<Lanes>(r), r);
  const Pair<Float> mantissa = fast_two_sum(one, s);
  const Float mantissa_low = Lanes::fma(r_low, mantissa.high, mantissa.low);

  // The power of two goes on in two steps, the second after log1p and sigmoid, which are the
  // identity on tiny numbers: so that the pairs below stay normal and a subnormal result is rounded
  // from all its digits.
  const Float first =
      Lanes::max(Lanes::set(F::kRound + F::kExponentBias + F::kTinyExponent), biased);
  const auto power = [](Float biased) {
    return Lanes::from_bits(Lanes::to_bits(biased) << F::kMantissaBits);
  };
  const Float first_scale = power(first);
  const Float second_scale = power((biased - first) + round);
  const Float e = mantissa.high * first_scale, e_low = mantissa_low * first_scale;

  // sigmoid(-|x|) = e / (1 + e), and sigmoid(|x|) = 1 / (1 + e) is one minus that.
  const Pair<Float> denominator = fast_two_sum(one, e);
  const Float quotient = e / denominator.high;
  const Float sigmoid = one - quotient;
  const Float e_low_sigmoid = e_low * sigmoid;
  const Float remainder = Lanes::fma(-quotient, denominator.high, e) + e_low_sigmoid;
  const Float quotient_low = sigmoid * Lanes::fma(-quotient, denominator.low, remainder);

  // log1p(e) = log1p(f), or log(2) + log1p(f) with f = (e - 1) / 2 for the larger e.
  const auto large = e >= half;
  const Float f = Lanes::select(large, Lanes::fma(e, half, -half), e);
  const Pair<Float> log1p =
      fast_two_sum(Lanes::select(large, Lanes::set(Scalar(0.6931471805599453)), zero), f);
  const Float log1p_low =
      log1p.low +
      Lanes::fma(f * f, Lanes::fma(f, F::template log1p_tail<Lanes>(f), -half), e_low_sigmoid);

  // c = x >= 0 ? 1 - y : y
  const auto negative = sign != Lanes::to_bits(zero);  // of -0 too, as the gradient's sign
  const Pair<Float> complement = fast_two_sum(one, -label);
  const Float c = Lanes::select(negative, label, complement.high);
  const Float c_low = Lanes::select(negative, zero, complement.low);

  Element<Lanes> element;
  const Float bounded = Lanes::select(c == zero, zero, magnitude);  // 0 * infinity is 0 here
  const Float linear = bounded * c;
  const Float linear_low = Lanes::fma(bounded, c_low, Lanes::fma(bounded, c, -linear));
  const Pair<Float> loss = two_sum(linear, log1p.high * second_scale);
  const Float loss_rest = loss.low + Lanes::fma(log1p_low, second_scale, linear_low);
  // What the rounding of an infinite loss lost is not a number.
  const auto finite = loss.high < Lanes::set(F::kInfinity);
  const Pair<Float> rounded = fast_two_sum(loss.high, Lanes::select(finite, loss_rest, zero));
  element.loss = rounded.high;
  element.loss_low = rounded.low;

  const Pair<Float> difference = two_sum(c, -(quotient * second_scale));
  const Pair<Float> gradient = fast_two_sum(
      difference.high, difference.low + Lanes::fma(-quotient_low, second_scale, c_low));
  element.gradient = Lanes::from_bits(Lanes::to_bits(gradient.high) ^ sign);
  element.gradient_low = Lanes::from_bits(Lanes::to_bits(gradient.low) ^ sign);
  return element;
}

}  // namespace jax_bce
