// Focal and asymmetric loss: the cross-entropy times a power of the probability of the other class.
// With p = sigmoid(x), m = 1 - p and v = max(p - clip, 0),
//     cross = -y log(p) - (1 - y) log(1 - v)
//     b     = y m + (1 - y) v
//     loss  = b^gamma cross,  gamma = y gamma_pos + (1 - y) gamma_neg
//     gradient = b^gamma (d cross / dx + gamma (db / dx) / b cross).
// Focal loss has one gamma and no clip. If the power is to be a constant, the second term is left
// out. Nothing cancels for labels of 0 and 1, so few steps need pairs:
//   - the power's logarithm, gamma log(b), may be -100: its error is that of its exponential;
//   - p - clip, if p is close to clip. With d = x - log(clip / (1 - clip)), a pair as well, it is
//     clip m (exp(d) - 1), which is accurate for small d;
//   - log(1 - v), for which 1 - v = m + clip and v are both known.
//
// The contract: float32, labels 0 and 1, gammas in 0..5: focal loss <= 4 ulp, asymmetric <= 8 ulp,
// for loss and gradient.
#pragma once

#include "bce_math.h"

namespace jax_bce {

template <class Float>
struct Focus {
  Float gamma_neg, gamma_pos, clip, clip_logit, clip_logit_low;
  int integer_neg, integer_pos;  // the gammas, where all elements have the same 0, 1, 2 or 4
};

// The weight of a label's class, for the weight alpha of label 1.
template <class Lanes>
BCE_INLINE typename Lanes::Float balance_of(typename Lanes::Float alpha,
                                            typename Lanes::Float label,
                                            typename Lanes::Float smoothing) {
  const auto [y, n] = labels_of<Lanes>(label, smoothing);
  return Lanes::fma(alpha, y.high, (Lanes::set(1) - alpha) * n.high);
}

template <class Float>
struct FocalResult {
  Pair<Float> loss;
  Float gradient;
};

// -log(u) for u = 1 - v > 0. If kTiny, u may be subnormal.
template <class Lanes, bool kTiny>
BCE_INLINE Pair<typename Lanes::Float> minus_log_of(Pair<typename Lanes::Float> u,
                                                    Pair<typename Lanes::Float> v) {
  using Scalar = typename Lanes::Scalar;
  using Float = typename Lanes::Float;
  using Bits = typename Lanes::Bits;
  using F = Format<Scalar>;
  Float shift = Lanes::set(0);
  if constexpr (kTiny) {
    const auto tiny = u.high < Lanes::set(Scalar(1) / (1ull << 60));
    const Float up = Lanes::set(Scalar(1ull << 60));
    u = {Lanes::select(tiny, u.high * up, u.high), Lanes::select(tiny, u.low * up, u.low)};
    shift = Lanes::select(tiny, Lanes::set(60), shift);
  }
  // u = 2^k f with f from sqrt(1/2) to sqrt(2), and log(f) = log1p(f - 1).
  const Bits half = Lanes::to_bits(Lanes::set(Scalar(0.70710678118654752)));
  const Bits one = Lanes::to_bits(Lanes::set(1));
  const Bits from_half = Lanes::to_bits(u.high) + (one - half);
  const Bits exponent = from_half >> F::kMantissaBits;  // biased
  const Float f = Lanes::from_bits((from_half - (exponent << F::kMantissaBits)) + half);
  const Float round = Lanes::set(F::kRound);
  const Float k =
      Lanes::from_bits(Lanes::to_bits(round) | exponent) - Lanes::set(F::kRound + F::kExponentBias);
  const Float inverse = Lanes::from_bits((one + one) - (exponent << F::kMantissaBits));
  const auto near = k - shift == Lanes::set(0);
  const Float high = Lanes::select(near, -v.high, f - Lanes::set(1));
  const Float low = Lanes::select(near, -v.low, u.low * inverse);
  const Pair<Float> log1p = log1p_of<Lanes>({high, low, Lanes::set(1)});
  const Float power = shift - k;
  const Pair<Float> sum = fast_two_sum(power * Lanes::set(F::kLn2High), -log1p.high);
  return fast_two_sum(sum.high, sum.low + Lanes::fma(power, Lanes::set(F::kLn2Low), -log1p.low));
}

// log(p / (1 - p)) for 0 < p < 1.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> logit_of(typename Lanes::Float p) {
  using Float = typename Lanes::Float;
  const Pair<Float> positive = {p, Lanes::set(0)}, negative = fast_two_sum(Lanes::set(1), -p);
  const Pair<Float> a = minus_log_of<Lanes, true>(positive, negative);
  const Pair<Float> b = minus_log_of<Lanes, true>(negative, positive);
  const Pair<Float> sum = two_sum(b.high, -a.high);
  return {sum.high, sum.low + (b.low - a.low)};
}

// base^gamma as a product, for gammas of 0, 1, 2 and 4 and a result that is a normal number.
template <class Lanes>
BCE_INLINE Pair<typename Lanes::Float> product_power_of(Pair<typename Lanes::Float> base,
                                                        int gamma) {
  if (gamma == 0) return {Lanes::set(1), Lanes::set(0)};
  if (gamma == 1) return base;
  const auto square = product_of<Lanes>(base, base);
  return gamma == 2 ? square : product_of<Lanes>(square, square);
}

// base^gamma, given -log(base).
template <class Lanes, class Gamma>
BCE_INLINE Exponential<Lanes> power_of(Pair<typename Lanes::Float> minus_log, Gamma gamma) {
  const auto exponent = finite_low<Lanes>(product_of<Lanes>(minus_log, gamma));
  const Exponential<Lanes> power = exp_of<Lanes>(exponent.high);
  const auto sum = fast_two_sum(power.e, Lanes::fma(power.e, -exponent.low, power.e_low));
  return {sum.high, sum.low, power.scale};
}

// The results, given b^gamma and what it multiplies.
template <class Lanes>
BCE_INLINE FocalResult<typename Lanes::Float> scaled_by(Exponential<Lanes> power,
                                                        Pair<typename Lanes::Float> cross,
                                                        typename Lanes::Float slope) {
  const auto loss = product_of<Lanes>({power.e, power.e_low}, cross);
  const auto gradient = Lanes::fma(power.e, slope, power.e_low * slope);
  return {{loss.high * power.scale, loss.low * power.scale}, gradient * power.scale};
}

// v = max(p - clip, 0) and u = 1 - v.
template <class Float>
struct Clipped {
  Pair<Float> v, u;
};

template <class Lanes>
BCE_INLINE Clipped<typename Lanes::Float> clipped(typename Lanes::Float logit,
                                                  Pair<typename Lanes::Float> p,
                                                  Pair<typename Lanes::Float> m,
                                                  Focus<typename Lanes::Float> focus) {
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0), one = Lanes::set(1);
  const Pair<Float> distance = two_sum(logit, -focus.clip_logit);
  const auto near = Lanes::magnitude(distance.high) <= Lanes::set(0.42);
  const Pair<Float> d = fast_two_sum(distance.high, distance.low - focus.clip_logit_low);
  const auto below = Lanes::select(near, d.high, distance.high) <= zero;
  const Float tail = Format<typename Lanes::Scalar>::template exp_tail<Lanes>(d.high);
  Pair<Float> grown = fast_two_sum(d.high, d.high * d.high * tail);  // exp(d) - 1
  grown.low = grown.low + Lanes::fma(d.low, d.high, d.low);
  const Pair<Float> close = product_of<Lanes>(product_of<Lanes>(m, focus.clip), grown);
  const Pair<Float> apart = fast_two_sum(p.high, -focus.clip);
  const auto choose = [&](Float close, Float apart) {
    return Lanes::select(below, zero, Lanes::select(near, close, apart));
  };
  const Pair<Float> v = {choose(close.high, apart.high), choose(close.low, apart.low + p.low)};
  const Pair<Float> u =
      fast_two_sum(Lanes::max(m.high, focus.clip), Lanes::min(m.high, focus.clip));
  return {v, {Lanes::select(below, one, u.high), Lanes::select(below, zero, u.low + m.low)}};
}

// For a common logit, a label of 0 or 1, and no smoothing: steps as in bce_math.h. If kProducts,
// all elements have gammas for product_power_of.
template <class Lanes, bool kClips, bool kProducts>
class HardFocal {
 public:
  using Float = typename Lanes::Float;

  BCE_INLINE void probabilities(Float logit, Float label, Exponential<Lanes> exponential) {
    z_ = logit * turn_of<Lanes>(label);
    p_ = rounded(turned_gradient_of<Lanes>(z_, exponential));
    m_ = rounded(turned_gradient_of<Lanes>(-z_, exponential));
  }

  BCE_INLINE void clip(Float label, Focus<Float> focus) {
    const auto positive = label == Lanes::set(1);
    focus.clip = Lanes::select(positive, Lanes::set(0), focus.clip);
    focus.clip_logit = Lanes::select(positive, Lanes::set(-0x1p100), focus.clip_logit);
    clip_ = clipped<Lanes>(z_, p_, m_, focus);
    // Where v is 0, so are the results, and the power does not matter.
    const auto none = clip_.v.high == Lanes::set(0);
    base_ = {Lanes::select(none, Lanes::set(1), clip_.v.high), clip_.v.low};
    rest_ = {Lanes::select(none, Lanes::set(0), clip_.u.high), clip_.u.low};
  }

  BCE_INLINE void logarithms(Exponential<Lanes> exponential) {
    if constexpr (kClips) {
      cross_ = minus_log_of<Lanes, false>(clip_.u, clip_.v);
      if constexpr (!kProducts) minus_log_ = minus_log_of<Lanes, false>(base_, rest_);
    } else {
      cross_ = rounded(turned_loss_of<Lanes>(z_, exponential));
      if constexpr (!kProducts) minus_log_ = rounded(turned_loss_of<Lanes>(-z_, exponential));
    }
  }

  BCE_INLINE FocalResult<Float> result(Float label, Focus<Float> focus, bool constant_power) const {
    const auto positive = label == Lanes::set(1);
    const Float gamma = Lanes::select(positive, focus.gamma_pos, focus.gamma_neg);
    Float slope;
    if constexpr (kClips) {
      slope = base_.high;
      if (!constant_power) slope = Lanes::fma(gamma * cross_.high, clip_.u.high, slope);
      slope = p_.high * m_.high * slope / (clip_.u.high * base_.high);
      slope = Lanes::select(clip_.v.high == Lanes::set(0), Lanes::set(0), slope);
    } else {
      slope = p_.high;
      if (!constant_power) slope = Lanes::fma(gamma * m_.high, cross_.high, slope);
    }
    return scaled_by<Lanes>(power(positive, gamma, focus), cross_, turn_of<Lanes>(label) * slope);
  }

 private:
  template <class Mask>
  BCE_INLINE Exponential<Lanes> power(Mask positive, Float gamma, Focus<Float> focus) const {
    const Pair<Float> base = kClips ? base_ : p_;
    const Float one = Lanes::set(1);
    if constexpr (kProducts) {
      const auto of_negative = product_power_of<Lanes>(base, focus.integer_neg);
      if (focus.integer_neg == focus.integer_pos) return {of_negative.high, of_negative.low, one};
      const auto of_positive = product_power_of<Lanes>(base, focus.integer_pos);
      return {Lanes::select(positive, of_positive.high, of_negative.high),
              Lanes::select(positive, of_positive.low, of_negative.low), one};
    }
    Exponential<Lanes> power = power_of<Lanes>(minus_log_, gamma);
    // An element's bits do not depend on the gammas of others.
    for (int integer : {0, 1, 2, 4}) {
      const auto is_it = gamma == Lanes::set(integer);
      const auto product = product_power_of<Lanes>(base, integer);
      power = {Lanes::select(is_it, product.high, power.e),
               Lanes::select(is_it, product.low, power.e_low),
               Lanes::select(is_it, one, power.scale)};
    }
    return power;
  }

  static BCE_INLINE Pair<Float> rounded(Pair<Float> pair) {
    return fast_two_sum(pair.high, pair.low);
  }

  Float z_;
  Pair<Float> p_, m_, cross_, minus_log_;
  Clipped<Float> clip_;
  Pair<Float> base_, rest_;  // b and 1 - b
};

// For any other.
template <class Lanes>
BCE_INLINE FocalResult<typename Lanes::Float> soft_focal_of(
    typename Lanes::Float logit, typename Lanes::Float label, typename Lanes::Float smoothing,
    Exponential<Lanes> exponential, Focus<typename Lanes::Float> focus, bool constant_power) {
  using Scalar = typename Lanes::Scalar;
  using Float = typename Lanes::Float;
  const Float zero = Lanes::set(0), one = Lanes::set(1), scale = exponential.scale;
  const auto pick = [](auto which, Pair<Float> yes, Pair<Float> no) -> Pair<Float> {
    return {Lanes::select(which, yes.high, no.high), Lanes::select(which, yes.low, no.low)};
  };
  const auto labels = labels_of<Lanes>(label, smoothing);
  const Pair<Float> y = labels.y, n = labels.n;

  Pair<Float> small = sigmoid_of<Lanes>(exponential);  // sigmoid(-|x|)
  small = fast_two_sum(small.high, small.low);
  // p m / scale. exp_of does not tell logits beyond this one apart.
  const auto far = Lanes::magnitude(logit) >= Lanes::set(Format<Scalar>::kUnderflow);
  const Float product = Lanes::select(far, zero, small.high * (one - small.high));
  small = {small.high * scale, small.low * scale};
  Pair<Float> large = fast_two_sum(one, -small.high);
  large.low = large.low - small.low;
  const auto positive = logit >= zero;
  const Pair<Float> p = pick(positive, large, small), m = pick(positive, small, large);
  const Clipped<Float> clip = clipped<Lanes>(logit, p, m, focus);

  const Pair<Float> log1p = log1p_of<Lanes>(exponential);
  const auto softplus = [&](Float x) {
    const Pair<Float> sum = two_sum(Lanes::select(x > zero, x, zero), log1p.high * scale);
    const auto finite = finite_low<Lanes>({sum.high, sum.low + log1p.low * scale});
    return finite_low<Lanes>(fast_two_sum(finite.high, finite.low));
  };
  const auto times = [&](Pair<Float> coefficient, Pair<Float> value) {  // 0 times infinity is 0
    value.high = Lanes::select(coefficient.high == zero, zero, value.high);
    return finite_low<Lanes>(product_of<Lanes>(coefficient, value));
  };
  const auto mixture = [&](Pair<Float> of_positive, Pair<Float> of_negative) {
    const Pair<Float> a = times(y, of_positive), b = times(n, of_negative);
    const Pair<Float> sum = two_sum(a.high, b.high);
    return finite_low<Lanes>({sum.high, sum.low + (a.low + b.low)});
  };
  const auto no_clip = focus.clip == zero;
  const Pair<Float> unlikely =
      pick(no_clip, softplus(logit), minus_log_of<Lanes, true>(clip.u, clip.v));
  const Pair<Float> cross = mixture(softplus(-logit), unlikely);

  const Pair<Float> mixed = mixture(m, clip.v);
  const auto none = mixed.high == zero;
  const Pair<Float> base = pick(none, {one, zero}, mixed);
  Pair<Float> minus_log =
      minus_log_of<Lanes, true>(base, pick(none, {zero, zero}, mixture(p, clip.u)));
  minus_log = pick(none, {Lanes::set(Scalar(1 << 20)), zero}, minus_log);
  minus_log.high = Lanes::select(base.high > zero, minus_log.high, Lanes::set(__builtin_nan("")));
  const Pair<Float> to_pos = two_sum(focus.gamma_pos, -focus.gamma_neg);
  const Pair<Float> change = product_of<Lanes>(y, to_pos);
  const Pair<Float> sum = two_sum(focus.gamma_neg, change.high);
  const Pair<Float> gamma = {sum.high, sum.low + change.low};
  const Exponential<Lanes> power = power_of<Lanes>(minus_log, gamma);

  const Float negative = Lanes::select(clip.v.high == zero, zero, n.high);
  const Float rises = Lanes::select(no_clip, p.high, product / clip.u.high * scale);
  Float slope = negative * rises - y.high * m.high;
  if (!constant_power) {
    const Float relative = product * (negative - y.high) / base.high;
    const Float term = gamma.high * relative * cross.high * scale;
    slope = slope + Lanes::select(product * scale == zero, zero, term);
  }
  // 0 times an infinite result is 0.
  const FocalResult<Float> result = scaled_by<Lanes>(power, cross, slope);
  const auto vanishes = power.e * power.scale == zero;
  return {finite_low<Lanes>(pick(vanishes, {zero, zero}, result.loss)),
          Lanes::select(vanishes, zero, result.gradient)};
}

// Whether an element is one for HardFocal.
template <class Lanes>
BCE_INLINE auto is_hard(typename Lanes::Float logit, typename Lanes::Float label,
                        typename Lanes::Float smoothing) {
  const auto zero = Lanes::set(0), limit = Lanes::set(Format<typename Lanes::Scalar>::kCommon);
  return (smoothing == zero) & (Lanes::fma(label, label, -label) == zero) &
         (Lanes::magnitude(logit) <= limit);
}

}  // namespace jax_bce
