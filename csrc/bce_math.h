// THE formulas, once, for every lane type: a host SIMD vector, a host scalar, a CUDA thread.
//
// One element of binary cross-entropy has a logit x and a label y. Smoothing by s replaces y by
// y (1 - s) + s / 2. The element's loss and gradient,
//     loss     = (1 - y) log(1 + exp(x)) + y log(1 + exp(-x))
//     gradient = d loss / dx = (1 - y) sigmoid(x) - y sigmoid(-x),
// are computed from e = exp(-|x|) alone, without cancellation:
//     loss     = log1p(e) + c |x|
//     gradient = sign(x) (c - e / (1 + e)),    c = x >= 0 ? 1 - y : y.
// A weight q of the positive class replaces y by q y, but not in 1 - y:
//     loss     = t log1p(e) + c |x|
//     gradient = sign(x) (c - t e / (1 + e)),  c = x >= 0 ? 1 - y : q y,  t = 1 - y + q y.
// The second derivative is
//     hessian  = t e / (1 + e)^2.
//
// The accuracy contract (tests/oracle.py has the same numbers):
//     float32, labels 0 and 1   <= 1 ulp for loss and gradient, on every one of the 2^32 logits
//     float32, labels in (0,1)  loss <= 2 ulp; gradient error <= 1 ulp of
//                               max((1 - y) sigmoid(x), y sigmoid(-x))
//     float32 Hessian           <= 1 ulp, with any label
//     float64                   <= 4 ulp
//     bfloat16, float16         <= 0.502 ulp: rounded only once, from about float32's accuracy;
//                               labels in (0,1) gradient error larger by 2^-22 of that maximum
//                               (on a GPU 2^-21)
//     weights                   error larger by <= 1 ulp of the arithmetic's type for each of
//                               weight, sample_weight and pos_weight that an element has, if the
//                               result without them is a normal number
//     float32 sums              <= 2^-23, relative, of elements of one sign, also weighted and
//                               masked; of 16-bit logits <= 2^-21
//     infinities, NaN, tails    the limit; NaN; gradual underflow
// Labels are first rounded to the arithmetic's type: with float32 logits, a float64 label is
// rounded to float32 before 1 - y is computed.
// To meet the contract, every value whose rounding error matters is a pair: x, and its low part
// x_low.
//
// Only + - * fma / select and integer operations are used, in a fixed order, with contraction off
// in every compiler, so that each lane type gives the same bits.
//
// A Lanes class defines Scalar (float or double), Float (its lanes) and Bits (unsigned, of the same
// width), and has set, fma, divide, select, min and max (of numbers), magnitude, to_bits and
// from_bits; for what is rounded to 16 bits also ratio and, on a GPU, exp2, which may be
// approximations.
#pragma once

#ifdef __CUDACC__
#define BCE_INLINE __host__ __device__ __forceinline__
#define BCE_UNROLL _Pragma("unroll")
#else
#define BCE_UNROLL _Pragma("GCC unroll 16")
#define BCE_INLINE inline __attribute__((always_inline))
#endif

namespace jax_bce {

// c0 + c1 x + c2 x^2 + ...: Horner's rule in x^2 over pairs of terms. The chain of dependent
// operations is half as long, for one more operation.
template <class Lanes, class... Coefficients>
BCE_INLINE typename Lanes::Float polynomial(typename Lanes::Float x, Coefficients... coefficients) {
  using Float = typename Lanes::Float;
  constexpr int kCount = sizeof...(coefficients);
  const Float c[] = {Lanes::set(coefficients)...}, x2 = x * x;
  Float sum = kCount % 2 ? c[kCount - 1] : Lanes::fma(c[kCount - 1], x, c[kCount - 2]);
  BCE_UNROLL
  for (int i = (kCount - 1) / 2 * 2 - 2; i >= 0; i -= 2)
    sum = Lanes::fma(sum, x2, Lanes::fma(c[i + 1], x, c[i]));
  return sum;
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
  static constexpr float kCommon = 44;         // exp(-44) is above it
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // k * high is exact

  // (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2, to a relative 2^-31 of exp(r)
  template <class Lanes>
  static BCE_INLINE typename Lanes::Float exp_tail(typename Lanes::Float r) {
    return polynomial<Lanes>(r, 0x1p-1f, 0x1.555556p-3f, 0x1.555502p-5f, 0x1.110fc2p-7f,
                             0x1.6d2e06p-10f, 0x1.a2d99ap-13f);
  }

  // (artanh(w) - w) / w^3 as a polynomial in w^2, |w| <= 1/3, to a relative 2^-31 of artanh(w)
  template <class Lanes>
  static BCE_INLINE typename Lanes::Float artanh_tail(typename Lanes::Float w2) {
    return polynomial<Lanes>(w2, 0x1.555556p-2f, 0x1.999866p-3f, 0x1.24d76ep-3f, 0x1.bb3124p-4f,
                             0x1.e1216p-4f);
  }

  // The same for what is rounded to 16 bits: to 2^-23 of exp(r), and to 2^-26 of artanh(w). The
  // last digits were chosen so that all bfloat16 results are rounded as if once.
  template <class Lanes>
  static BCE_INLINE typename Lanes::Float short_exp_tail(typename Lanes::Float r) {
    return polynomial<Lanes>(r, 0x1.fffdfep-2f, 0x1.5557bp-3f, 0x1.572bdap-5f, 0x1.106a1ep-7f);
  }

  template <class Lanes>
  static BCE_INLINE typename Lanes::Float short_artanh_tail(typename Lanes::Float w2) {
    const auto tail = Lanes::fma(w2, Lanes::set(0x1.1357c6p-3f), Lanes::set(0x1.2115b6p-3f));
    return Lanes::fma(w2, Lanes::fma(w2, tail, Lanes::set(0x1.99adf6p-3f)),
                      Lanes::set(0x1.555554p-2f));
  }
};

template <>
struct Format<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kExponentBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kInfinity = __builtin_huge_val();
  static constexpr double kUnderflow = 750;
  static constexpr double kTinyExponent = -200, kCommon = 138;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;

  template <class Lanes>
  static BCE_INLINE typename Lanes::Float exp_tail(typename Lanes::Float r) {
    return polynomial<Lanes>(r, 0x1p-1, 0x1.5555555555555p-3, 0x1.5555555555556p-5,
                             0x1.111111111137fp-7, 0x1.6c16c16c15ff9p-10, 0x1.a01a019ea7c8ep-13,
                             0x1.a01a01a81960bp-16, 0x1.71de405d63ca9p-19, 0x1.27e4d815531e4p-22,
                             0x1.ae4d6d6175864p-26, 0x1.1f78e74065839p-29, 0x1.81cbfb8d3b654p-33);
  }

  template <class Lanes>
  static BCE_INLINE typename Lanes::Float artanh_tail(typename Lanes::Float w2) {
    return polynomial<Lanes>(w2, 0x1.5555555555555p-2, 0x1.9999999999b13p-3, 0x1.2492492483f12p-3,
                             0x1.c71c71ce0cbe4p-4, 0x1.745d16ae53f07p-4, 0x1.3b13a6616eb38p-4,
                             0x1.1114a0bbc2084p-4, 0x1.e131045d3ee6p-5, 0x1.b841f705a7ee6p-5,
                             0x1.42b0c302c79efp-5, 0x1.3295b98a832b2p-4);
  }
};

// A number and its rounding error.
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

// exp(-|x|) = (e + e_low) scale. The power of two is applied in two steps, scale after log1p and
// sigmoid, which are the identity on tiny numbers. This keeps the pairs normal, and a subnormal
// result is rounded from all its digits. scale is 1 unless the number is tiny.
template <class Lanes>
struct Exponential {
  typename Lanes::Float e, e_low, scale;
};

template <class Lanes>
BCE_INLINE typename Lanes::Bits sign_of(typename Lanes::Float value) {
  constexpr int kSignBit = 8 * sizeof(typename Lanes::Scalar) - 1;
  return Lanes::to_bits(value) >> kSignBit << kSignBit;
}

// high + low rounded to odd: a second rounding, to half as many digits, then gives the same result
// as rounding the sum only once. A low that is NaN changes nothing.
template <class Lanes>
BCE_INLINE typename Lanes::Float round_to_odd(typename Lanes::Float high,
                                              typename Lanes::Float low) {
  const typename Lanes::Bits bits = Lanes::to_bits(high);
  const typename Lanes::Float zero = Lanes::set(0);
  const typename Lanes::Float outward =
      Lanes::from_bits(Lanes::to_bits(low) ^ sign_of<Lanes>(high));
  return Lanes::select(outward > zero, Lanes::from_bits(bits | 1),
                       Lanes::select(outward < zero, Lanes::from_bits((bits - 1) | 1), high));
}

// The steps from logit and label to loss and gradient: exp_of, then loss_of and gradient_of, which
// return unrounded pairs. A GPU performs all steps for an element. A CPU, whose instruction window
// is smaller than this chain of dependent instructions, performs each step for a whole tile.
//
// kCommon promises a logit within Format::kCommon of 0, a label of 0 or 1 and no smoothing, as in
// nearly all training. Operations that then have no effect are left out; the bits are the same.
//
// kPrecise: the pair's error is about 2^-28 instead of 2^-26.
template <class Lanes, bool kCommon = false, bool kPrecise = false>
BCE_INLINE Exponential<Lanes> exp_of(typename Lanes::Float logit) {
  using Scalar = typename Lanes::Scalar;
  using Float = typename Lanes::Float;
  using F = Format<Scalar>;

  // exp(-a) = 2^exponent (1 + s). The lowest bits of `biased` hold the biased exponent.
  Float a = Lanes::magnitude(logit);
  const Float underflow = Lanes::set(F::kUnderflow);
  if constexpr (!kCommon) a = Lanes::select(a > underflow, underflow, a);
  const Float round = Lanes::set(F::kRound + F::kExponentBias);
  const Float biased = Lanes::fma(a, Lanes::set(Scalar(-1.4426950408889634)), round);
  const Float exponent = biased - round;
  const Float r_high = Lanes::fma(exponent, Lanes::set(-F::kLn2High), -a);
  // Unless kPrecise, the rounding error of r, up to a fifth of an ulp of e, is the only one that no
  // pair carries.
  const Float r = Lanes::fma(exponent, Lanes::set(-F::kLn2Low), r_high);
  const Float tail = F::template exp_tail<Lanes>(r), s = Lanes::fma(r * r, tail, r);
  const auto power_of = [](Float biased) {
    return Lanes::from_bits(Lanes::to_bits(biased) << F::kMantissaBits);
  };
  Float first = biased, scale = Lanes::set(1);
  if constexpr (!kCommon) {
    first = Lanes::max(Lanes::set(F::kRound + F::kExponentBias + F::kTinyExponent), biased);
    scale = power_of(biased - first + round);
  }
  const Float power = power_of(first), e = Lanes::fma(s, power, power);
  Float e_low = Lanes::fma(s, power, power - e);
  if constexpr (kPrecise) {
    const Float r_low = Lanes::fma(exponent, Lanes::set(-F::kLn2Low), r_high - r);
    const Float s_low = Lanes::fma(r * r, tail, r - s);
    e_low = Lanes::fma(r_low, e, Lanes::fma(s_low, power, e_low));
  }
  return {e, e_low, scale};
}

// +1 for a label of 0, -1 for a label of 1. A label of 1 is like 0 with the signs of the logit and
// of the gradient flipped.
template <class Lanes>
BCE_INLINE typename Lanes::Float turn_of(typename Lanes::Float label) {
  return Lanes::fma(Lanes::set(-2), label, Lanes::set(1));
}

template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> product_of(Pair<typename Lanes::Float> a,
                                                  Pair<typename Lanes::Float> b) {
  const auto product = a.high * b.high;
  const auto low = Lanes::fma(a.high, b.high, -product);
  return {product, low + Lanes::fma(a.high, b.low, a.low * b.high)};
}

// The same for b without a low part.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> product_of(Pair<typename Lanes::Float> a,
                                                  typename Lanes::Float b) {
  const auto product = a.high * b;
  return {product, Lanes::fma(a.high, b, -product) + a.low * b};
}

// c + step (1/2 - y), where step is +-s: y or 1 - y, smoothed.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> smoothed(Pair<typename Lanes::Float> c,
                                                typename Lanes::Float step,
                                                Pair<typename Lanes::Float> to_half) {
  using Float = typename Lanes::Float;
  const Float change = step * to_half.high;
  const Float change_low = Lanes::fma(step, to_half.low, Lanes::fma(step, to_half.high, -change));
  const Pair<Float> sum = two_sum(c.high, change);
  return {sum.high, sum.low + (c.low + change_low)};
}

// c = x >= 0 ? 1 - y : y. A logit of -0 counts as negative, for the sign of its gradient.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> coefficient_of(typename Lanes::Float logit,
                                                      typename Lanes::Float label) {
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0);
  const auto negative = sign_of<Lanes>(logit) != Lanes::to_bits(zero);
  const Pair<Float> complement = fast_two_sum(Lanes::set(1), -label);
  return {Lanes::select(negative, label, complement.high),
          Lanes::select(negative, zero, complement.low)};
}

// The same of a smoothed y: neither y nor 1 - y is computed from the other's rounded value.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> coefficient_of(typename Lanes::Float logit,
                                                      typename Lanes::Float label,
                                                      typename Lanes::Float smoothing) {
  const auto negative = sign_of<Lanes>(logit) != Lanes::to_bits(Lanes::set(0));
  const auto step = Lanes::select(negative, smoothing, -smoothing);
  return smoothed<Lanes>(coefficient_of<Lanes>(logit, label), step,
                         two_sum(Lanes::set(0.5), -label));
}

// A smoothed label y, and n = 1 - y.
template <class Float>
struct Labels {
  Pair<Float> y, n;
};

template <class Lanes>
BCE_INLINE Labels<typename Lanes::Float> labels_of(typename Lanes::Float label,
                                                   typename Lanes::Float smoothing) {
  const auto to_half = two_sum(Lanes::set(0.5), -label);
  return {smoothed<Lanes>({label, Lanes::set(0)}, smoothing, to_half),
          smoothed<Lanes>(fast_two_sum(Lanes::set(1), -label), -smoothing, to_half)};
}

// c with q, and t.
template <class Float>
struct Coefficients {
  Pair<Float> c, t;
};

template <class Lanes>
BCE_INLINE Coefficients<typename Lanes::Float> coefficients_of(typename Lanes::Float logit,
                                                               typename Lanes::Float label,
                                                               typename Lanes::Float smoothing,
                                                               typename Lanes::Float pos_weight) {
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0), one = Lanes::set(1);
  const auto negative = sign_of<Lanes>(logit) != Lanes::to_bits(zero);
  const auto [y, n] = labels_of<Lanes>(label, smoothing);
  const Pair<Float> p = product_of<Lanes>(y, pos_weight);
  const Pair<Float> sum = two_sum(n.high, p.high);
  // For q = 1, exactly the value without q.
  const auto plain = pos_weight == one;
  return {
      {Lanes::select(negative, p.high, n.high), Lanes::select(negative, p.low, n.low)},
      {Lanes::select(plain, one, sum.high), Lanes::select(plain, zero, sum.low + (n.low + p.low))}};
}

// The pair with a low part of 0 if the number is infinite: its rounding error would be NaN.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> finite_low(Pair<typename Lanes::Float> pair) {
  const auto infinity = Lanes::set(Format<typename Lanes::Scalar>::kInfinity);
  return {pair.high,
          Lanes::select(Lanes::magnitude(pair.high) < infinity, pair.low, Lanes::set(0))};
}

// log1p(e) = 2 artanh(w) = 2 w + 2 w^3 P(w^2) with w = e / (2 + e) <= 1/3; 2 / (2 + e) = 1 - w.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> log1p_of(Exponential<Lanes> exponential) {
  using Float = typename Lanes::Float;
  const Float e = exponential.e;
  const Float w = Lanes::divide(e, Lanes::set(2) + e), log1p = w + w;
  const Float complement = Lanes::set(1) - w, remainder = Lanes::fma(-w, e, e - log1p);
  const Float tail = Format<typename Lanes::Scalar>::template artanh_tail<Lanes>(w * w);
  return {log1p, Lanes::fma(log1p * (w * w), tail,
                            complement * Lanes::fma(exponential.e_low, complement, remainder))};
}

// sigmoid(-|x|) = q = e / (1 + e), and sigmoid(|x|) = 1 / (1 + e) = 1 - q. As e / 2 <= q <= e, the
// difference e - q is exact, and so is the remainder of the division, e - q - q e.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> sigmoid_of(Exponential<Lanes> exponential) {
  using Float = typename Lanes::Float;
  const Float e = exponential.e, one = Lanes::set(1);
  const Float q = Lanes::divide(e, one + e), complement = one - q;
  const Float remainder = Lanes::fma(-q, e, e - q);
  return {q, complement * Lanes::fma(exponential.e_low, complement, remainder)};
}

// sigmoid(|x|) = 1 - q.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> complement_of(Pair<typename Lanes::Float> q) {
  const auto one = Lanes::set(1), complement = one - q.high;
  return {complement, (-q.high - (complement - one)) - q.low};
}

// The loss and the gradient of a logit with a label of 0, if the loss is finite. kCommon: the scale
// is 1.
template <class Lanes, bool kCommon = true>
BCE_INLINE Pair<typename Lanes::Float> turned_loss_of(typename Lanes::Float logit,
                                                      Exponential<Lanes> exponential) {
  using Float = typename Lanes::Float;
  Pair<Float> log1p = log1p_of<Lanes>(exponential);
  if constexpr (!kCommon) log1p = {log1p.high * exponential.scale, log1p.low * exponential.scale};
  const Float linear = Lanes::max(logit, Lanes::set(0));
  const Pair<Float> sum =
      fast_two_sum(Lanes::max(linear, log1p.high), Lanes::min(linear, log1p.high));
  return {sum.high, sum.low + log1p.low};
}

template <class Lanes, bool kCommon = true>
BCE_INLINE Pair<typename Lanes::Float> turned_gradient_of(typename Lanes::Float logit,
                                                          Exponential<Lanes> exponential) {
  auto q = sigmoid_of<Lanes>(exponential);
  if constexpr (!kCommon) {
    // 0 becomes -0, which is what gradient_of gives.
    const auto zero = Lanes::set(0);
    q = {-(zero - q.high * exponential.scale), -(zero - q.low * exponential.scale)};
  }
  const auto complement = complement_of<Lanes>(q);
  const auto positive = logit >= Lanes::set(0);
  return {Lanes::select(positive, complement.high, q.high),
          Lanes::select(positive, complement.low, q.low)};
}

// The loss and the gradient from c, with log1p and sigmoid times t. kCommon: all numbers are
// finite, and the scale is 1.
template <class Lanes, bool kCommon = false>
BCE_INLINE Pair<typename Lanes::Float> loss_from(typename Lanes::Float logit,
                                                 Pair<typename Lanes::Float> c,
                                                 Pair<typename Lanes::Float> logarithm,
                                                 typename Lanes::Float scale) {
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0);
  Float bounded = Lanes::magnitude(logit);
  // 0 times an infinite logit is 0 here.
  if constexpr (!kCommon) bounded = Lanes::select(c.high == zero, zero, bounded);
  const Float linear = bounded * c.high;
  const Float linear_low = Lanes::fma(bounded, c.low, Lanes::fma(bounded, c.high, -linear));
  if constexpr (kCommon) {
    const Pair<Float> sum = two_sum(linear, logarithm.high);
    return {sum.high, sum.low + (logarithm.low + linear_low)};
  } else {
    const Pair<Float> sum = two_sum(linear, logarithm.high * scale);
    const Float low = sum.low + Lanes::fma(logarithm.low, scale, linear_low);
    // The rounding error of an infinite loss would be NaN.
    return finite_low<Lanes>({sum.high, low});
  }
}

template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> gradient_from(typename Lanes::Float logit,
                                                     Pair<typename Lanes::Float> c,
                                                     Pair<typename Lanes::Float> sigmoid,
                                                     typename Lanes::Float scale) {
  using Float = typename Lanes::Float;
  Pair<Float> difference = two_sum(c.high, -(sigmoid.high * scale));
  difference.low = difference.low + Lanes::fma(-sigmoid.low, scale, c.low);
  const auto sign = sign_of<Lanes>(logit);
  return {Lanes::from_bits(Lanes::to_bits(difference.high) ^ sign),
          Lanes::from_bits(Lanes::to_bits(difference.low) ^ sign)};
}

// kPositive: there is a pos_weight, q. With kCommon, the caller includes q in the element's weight,
// as `weight_of` does.
template <class Lanes, bool kCommon = false, bool kPositive = false>
BCE_INLINE Pair<typename Lanes::Float> loss_of(typename Lanes::Float logit,
                                               typename Lanes::Float label,
                                               typename Lanes::Float smoothing,
                                               Exponential<Lanes> exponential,
                                               typename Lanes::Float pos_weight = {}) {
  using Float = typename Lanes::Float;
  if constexpr (kCommon) {
    return turned_loss_of<Lanes>(logit * turn_of<Lanes>(label), exponential);
  } else {
    Pair<Float> c, logarithm = log1p_of<Lanes>(exponential);
    if constexpr (kPositive) {
      const auto both = coefficients_of<Lanes>(logit, label, smoothing, pos_weight);
      c = both.c;
      logarithm = product_of<Lanes>(logarithm, both.t);
    } else {
      c = coefficient_of<Lanes>(logit, label, smoothing);
    }
    return loss_from<Lanes>(logit, c, logarithm, exponential.scale);
  }
}

template <class Lanes, bool kCommon = false, bool kPositive = false>
BCE_INLINE Pair<typename Lanes::Float> gradient_of(typename Lanes::Float logit,
                                                   typename Lanes::Float label,
                                                   typename Lanes::Float smoothing,
                                                   Exponential<Lanes> exponential,
                                                   typename Lanes::Float pos_weight = {}) {
  using Float = typename Lanes::Float;
  if constexpr (kCommon) {
    const Float turn = turn_of<Lanes>(label);
    const Pair<Float> gradient = turned_gradient_of<Lanes>(logit * turn, exponential);
    return {turn * gradient.high, turn * gradient.low};
  } else {
    Pair<Float> c, sigmoid = sigmoid_of<Lanes>(exponential);
    if constexpr (kPositive) {
      const auto both = coefficients_of<Lanes>(logit, label, smoothing, pos_weight);
      c = both.c;
      sigmoid = product_of<Lanes>(sigmoid, both.t);
    } else {
      c = coefficient_of<Lanes>(logit, label, smoothing);
    }
    return gradient_from<Lanes>(logit, c, sigmoid, exponential.scale);
  }
}

// The number, but at least `floor`; NaN if either is NaN.
template <class Lanes>
BCE_INLINE typename Lanes::Float floored(typename Lanes::Float number,
                                         typename Lanes::Float floor) {
  return Lanes::select(number >= floor, number, Lanes::fma(Lanes::set(0), number, floor));
}

// The second derivative, sigmoid(-|x|) (1 - sigmoid(-|x|)) t, but at least `floor`.
template <class Lanes, bool kCommon = false, bool kPositive = false>
BCE_INLINE Pair<typename Lanes::Float> hessian_of(typename Lanes::Float logit,
                                                  typename Lanes::Float label,
                                                  typename Lanes::Float smoothing,
                                                  Exponential<Lanes> exponential,
                                                  typename Lanes::Float floor,
                                                  typename Lanes::Float pos_weight = {}) {
  using Float = typename Lanes::Float;
  const Float one = Lanes::set(1);
  const Pair<Float> q = sigmoid_of<Lanes>(exponential);
  Pair<Float> hessian = product_of<Lanes>(q, complement_of<Lanes>(q));
  if constexpr (kPositive && kCommon)  // t is 1 or the weight
    hessian = product_of<Lanes>(hessian, Lanes::select(label == one, pos_weight, one));
  else if constexpr (kPositive)
    hessian =
        product_of<Lanes>(hessian, coefficients_of<Lanes>(logit, label, smoothing, pos_weight).t);
  if constexpr (kPositive) hessian = finite_low<Lanes>(hessian);
  if constexpr (!kCommon)
    hessian = {hessian.high * exponential.scale, hessian.low * exponential.scale};
  return {floored<Lanes>(hessian.high, floor),
          Lanes::select(hessian.high >= floor, hessian.low, Lanes::set(0))};
}

// An element's weight, and the q that remains for its formulas. For labels 0 and 1, q is just a
// factor: included in the weight, it changes neither the arithmetic of the formulas nor their
// accuracy.
template <class Float>
struct Weight {
  Pair<Float> weight;
  Float pos_weight;
};

template <class Lanes>
BCE_INLINE Weight<typename Lanes::Float> weight_of(Pair<typename Lanes::Float> weight,
                                                   typename Lanes::Float pos_weight,
                                                   typename Lanes::Float label,
                                                   typename Lanes::Float smoothing) {
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0), one = Lanes::set(1);
  const Pair<Float> product = product_of<Lanes>(weight, pos_weight);
  const Float exact = Lanes::select(smoothing == zero, label, Lanes::set(0.5));
  const Float high = Lanes::select(exact == one, product.high, weight.high);
  const Float low = Lanes::select(exact == one, product.low, weight.low);
  const Float rest = Lanes::select(exact == zero, one, pos_weight);
  return {{high, low}, Lanes::select(exact == one, one, rest)};
}

template <class Float>
BCE_INLINE Float high_of(Float number) {
  return number;
}
template <class Float>
BCE_INLINE Float high_of(Pair<Float> pair) {
  return pair.high;
}

// An element's loss times its weight, a number or a pair. A weight of 0 times an infinite loss is
// 0; no common element has an infinite loss.
template <class Lanes, bool kCommon = false, class Factor>
BCE_INLINE Pair<typename Lanes::Float> weighted(Pair<typename Lanes::Float> value, Factor weight) {
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0),
              infinity = Lanes::set(Format<typename Lanes::Scalar>::kInfinity);
  if constexpr (!kCommon) {
    const Float dropped = Lanes::select(high_of(weight) == zero, zero, value.high);
    value.high = Lanes::select(Lanes::magnitude(value.high) == infinity, dropped, value.high);
  }
  return finite_low<Lanes>(product_of<Lanes>(value, weight));
}

// What is rounded to 16 bits needs no pair, and takes half of the operations or fewer.

// exp(-|x|) of a common logit, to 2^-22, as in exp_of.
template <class Lanes>
BCE_INLINE typename Lanes::Float short_exp_of(typename Lanes::Float logit) {
  using Float = typename Lanes::Float;
  using F = Format<float>;
  const Float a = Lanes::magnitude(logit), round = Lanes::set(F::kRound + F::kExponentBias);
  const Float biased = Lanes::fma(a, Lanes::set(-1.4426950408889634f), round);
  const Float r = Lanes::fma(biased - round, Lanes::set(-0x1.62e43p-1f), -a);
  const Float s = Lanes::fma(r * r, F::short_exp_tail<Lanes>(r), r);
  const Float power = Lanes::from_bits(Lanes::to_bits(biased) << F::kMantissaBits);
  return Lanes::fma(s, power, power);
}

// log1p(e) / 2, as in log1p_of.
template <class Lanes>
BCE_INLINE typename Lanes::Float half_log1p_of(typename Lanes::Float e) {
  using Float = typename Lanes::Float;
  const Float w = Lanes::ratio(e, Lanes::set(2) + e), w2 = w * w;
  const Float tail = Format<float>::short_artanh_tail<Lanes>(w2);
  return Lanes::fma(w * w2, tail, w);
}

// Of a 16-bit logit x for which `is_narrow`, on a GPU.
template <class Lanes>
struct Narrow {
  typename Lanes::Float e, half_log1p;  // e = exp(-|x|)
};

// Whether exp(-|x|) is a normal number or, in float32, 0.
template <class Scalar>
BCE_INLINE bool is_narrow(Scalar magnitude) {
  using F = Format<Scalar>;
  return magnitude <= F::kCommon || (magnitude >= F::kUnderflow && magnitude < F::kInfinity);
}

// kDigits: of the logit, 8 or 11.
template <class Lanes, int kDigits>
BCE_INLINE Narrow<Lanes> narrow_of(typename Lanes::Float logit) {
  using Float = typename Lanes::Float;
  // exp(-a) = 2^power (1 + rest), with log2(e) in two parts. The product with the first is exact
  // for 8 digits.
  constexpr float kHigh = 0x1.7154p0f, kLowTimesLn2 = 0x1.480fb6p-18f, kLn2 = 0x1.62e43p-1f;
  const Float a = Lanes::magnitude(logit), power = a * Lanes::set(-kHigh);
  Float rest = a * Lanes::set(-kLowTimesLn2);
  if constexpr (kDigits > 8)
    rest = Lanes::fma(Lanes::fma(a, Lanes::set(-kHigh), -power), Lanes::set(kLn2), rest);
  const Float approximate = Lanes::exp2(power), e = Lanes::fma(approximate, rest, approximate);

  return {e, half_log1p_of<Lanes>(e)};
}

// gradient / divisor, to a relative 2^-21, for a label of 0; the denominator is (1 + e) * divisor.
// For a label of 1, the caller flips the signs of the logit before and of the gradient after.
template <class Lanes>
BCE_INLINE typename Lanes::Float hard_gradient_of(typename Lanes::Float logit,
                                                  typename Lanes::Float e,
                                                  typename Lanes::Float denominator) {
  return Lanes::ratio(Lanes::select(logit >= Lanes::set(0), Lanes::set(1), e), denominator);
}

// The second derivative, from e and the gradient for a label of 0, to 2^-21.
template <class Lanes>
BCE_INLINE typename Lanes::Float hard_hessian_of(typename Lanes::Float logit,
                                                 typename Lanes::Float e,
                                                 typename Lanes::Float gradient) {
  const auto other = Lanes::select(logit >= Lanes::set(0), e * gradient, Lanes::set(1) - gradient);
  return gradient * other;
}

// For a label from 0 to 1: c, and gradient / divisor, to 2^-21 of the larger of its two terms.
template <class Scalar>
BCE_INLINE Scalar soft_coefficient_of(Scalar logit, Scalar label, Scalar smoothing) {
  const Scalar c = logit >= 0 ? 1 - label : label;
  return c + smoothing * (Scalar(0.5) - c);
}

template <class Lanes>
BCE_INLINE typename Lanes::Float soft_gradient_of(typename Lanes::Float logit,
                                                  typename Lanes::Float c, typename Lanes::Float e,
                                                  typename Lanes::Float divisor) {
  const auto numerator = Lanes::fma(c - Lanes::set(1), e, c);
  return Lanes::ratio(Lanes::select(logit >= Lanes::set(0), numerator, -numerator),
                      Lanes::fma(e, divisor, divisor));
}

}  // namespace jax_bce
