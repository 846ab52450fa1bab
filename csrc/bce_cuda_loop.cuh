// The loop over elements. A warp evaluates up to a group of consecutive elements of the results, a
// thread four at a time (a quad), in the order defined in bce_problem.h. While a thread evaluates
// some quads, it loads the next ones.
//
// A turn is evaluated in one of several ways, the same for the whole warp. Common turns have all of
// their elements, and logits within Format::kCommon of 0. There are loops for those of
//   - hard labels, 0 and 1, without smoothing: with and without a gradient, and for results and
//     operands of any type and alignment;
//   - soft labels, or hard ones that are smoothed;
//   - hard labels with a weight, or with any modifiers of the usual types and forms.
// A focal loss has no such loop.
//
// Where another turn comes, the loop ends, the turn is evaluated on its own, which takes up to
// three times as long, and the loop begins again behind it.
#pragma once

#include "bce_cuda_numbers.cuh"
#include "bce_focal.h"

namespace jax_bce {

extern __shared__ uint4 shared_memory[];

namespace {

constexpr int kWarp = kFold, kWarps = 4, kThreads = kWarp * kWarps;

// Where an operand's number for an element of the results is: there is only one; each has its own;
// all elements of a column, or of a row, share it (of the matrix with Plan::inner columns); or only
// the strides tell.
enum class Form : int { kOne, kEach, kByColumn, kByRow, kOther };

struct Input : Modifier {
  Form form = Form::kOne;

  __device__ int64_t at(int64_t element) const {
    if (form == Form::kOne) return 0;
    if (form == Form::kEach) return element;
    int64_t offset = 0;
#pragma unroll 1
    for (int d = rank - 1; d > 0; --d) {
      const int64_t quotient = element / shape[d];
      offset += (element - quotient * shape[d]) * strides[d];
      element = quotient;
    }
    return offset + element * strides[0];
  }
};

// What has the same factor.
enum class Factors : uint8_t { kOne, kOneForRow, kAny };

// What happens to the losses: they are added up, left in the tile, or stored.
enum class Losses { kSum, kTile, kStore };

// A Problem as the kernels need it.
struct Plan {
  Input logits, labels, scale, smoothing, divisor, modifiers[kModifiersOfLosses];
  const void* divisor_low;  // where the divisor is
  Result loss, gradient;
  bool reduce, total, constant_power;
  Losses losses;
  Factors factors;
  double inverse_count;
  int64_t rows, columns, groups_in_row;
  int tile_rows;  // 0: groups
  int count;      // of groups, or of tiles
  double* sums;   // of groups
  // n / inner is umulhi(n, magic) >> shift for 0 <= n < 2^31. 0: no operand needs it.
  uint32_t inner, magic, shift;
  // Whether logits and labels are in memory as in the results, or there is one label; whether also
  // all quads are aligned, so that each takes one transfer; and whether the results have the
  // logits' type, too.
  bool dense, aligned, direct;
  // Whether modifiers are of the usual types and forms, so that common turns may have them; and
  // whether four elements of a quad have theirs next to each other, or one.
  bool common_modifiers, whole_quads;
  uint32_t uses;  // a bit for each modifier there is

  template <class Scalar>
  __device__ Factor<Scalar> factor_at(int64_t element) const {
    const auto number = [&](const void* data, const Input& input, double absent) {
      const auto* numbers = static_cast<const Scalar*>(data);
      return numbers ? static_cast<double>(numbers[input.at(element)]) : absent;
    };
    return {number(scale.data, scale, 1) * inverse_count,
            number(divisor.data, divisor, 1) + number(divisor_low, divisor, 0)};
  }
};
static_assert(sizeof(Plan) <= 4096);  // as many bytes of parameters as any GPU takes

// The losses of a tile in shared memory, and where they are: spread so that the threads that add up
// rows do not all use the same banks.
template <class Scalar>
__device__ Pair<Scalar>* tile() {
  return reinterpret_cast<Pair<Scalar>*>(shared_memory);
}
__device__ int spread(int place) { return place + place / 32 * 2; }

// What a kernel evaluates. A focal loss may have modifiers, too.
enum class Kind { kPlain, kModified, kFocal };

template <class Logit, class Label, Kind kKind>
class Loop {
 public:
  using Scalar = ScalarOf<Logit>;

  __device__ explicit Loop(const Plan& plan)
      : plan_(plan),
        smoothing_(plan.smoothing.form == Form::kOne
                       ? *static_cast<const Scalar*>(plan.smoothing.data)
                       : Scalar(0)),
        smoothed_{coefficient_of<L>(Scalar(-1), Scalar(0), smoothing_),
                  coefficient_of<L>(Scalar(1), Scalar(0), smoothing_)},
        soft_(smoothing_ != 0) {}

  __device__ void set_factor(const Factor<Scalar>& factor) {
    zero_ = factor.is_zero();
    rest_ = factor.rest;
    power_ = static_cast<Scalar>(factor.power);
    divisor_ = L::reciprocal(rest_);
    usual_ = is_usual();
  }

  // Evaluates the warp's elements from `begin` on. Of a reduced problem, returns the thread's sum,
  // or puts the losses into the tile from `place` on.
  __device__ double evaluate(int64_t begin, int size, int place) {
    // Eight threads take 256 elements, an octet. Only the last one may have fewer.
    const int octet = threadIdx.x % kWarp / 8, within = threadIdx.x % 8 * kQuad;
    const int octets = (size + 255) / 256, last = size - (octets - 1) * 256;
    there_ = octet < octets;
    left_ = (octet < octets - 1 ? 256 : there_ ? last : 0) - within;
    element_ = begin + octet * 256 + within;
    place_ = place + octet * 256 + within;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) high_[c] = 0, low_[c] = 0;
    if (plan_.factors != Factors::kAny && zero_) {
      clear();
      return 0;
    }
    prepare(begin);
    const int end = octets > 1 ? 256 : last, whole = last / kStep * kStep;
    for (int at = 0; at < end; at += kStep) {
      if (at < whole) at += common_turns(whole - at, octet);
      if (at < end) any_turn();
    }
    if (!there_) return 0;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) high_[c] += low_[c];
    return (high_[0] + high_[2]) + (high_[1] + high_[3]);
  }

 private:
  using L = Lane<Scalar>;
  static constexpr bool kModified = kKind != Kind::kPlain, kFocal = kKind == Kind::kFocal;
  static constexpr bool kAny = std::is_same_v<Label, Any>, kAnyLogit = std::is_same_v<Logit, Any>;
  // Whether some of what is the same in each turn is decided by branches, in fewer loops: the more
  // types a loop has, the longer it takes to compile.
  static constexpr bool kFewLoops = kAny || sizeof(Logit) == 8;
  // 16-bit logits without modifiers: of four, labels turn two words, and the formulas are shorter.
  static constexpr bool kNarrow = sizeof(Logit) == 2 && !kModified;
  // Quads evaluated together while as many more are loaded.
  static constexpr int kQuads = sizeof(Logit) == 8                          ? 1
                                : kNarrow && std::is_same_v<Label, uint8_t> ? 4
                                                                            : 2;
  static constexpr int kStep = 32 * kQuads, kLast = kStep - 32 + kQuad;
  // Labels of bytes have kernels of their own.
  static constexpr int kWidths = kModified || sizeof(Logit) == 8 ? 15 : 14;
  // Logits of any type are converted where they are loaded, others where they are used: a warp that
  // converts has to wait for them, but one with modifiers has others beside it with much to do.
  using Logits = Quad<std::conditional_t<kAnyLogit, float, Logit>>;
  using Labels = typename std::conditional_t<kAny, std::common_type<AnyQuad<Scalar, kWidths>>,
                                             std::common_type<Quad<Label>>>::type;

  // Of the logits.
  __device__ Type type() const {
    if constexpr (kAnyLogit || std::is_same_v<Logit, uint16_t>)
      return plan_.logits.type;
    else
      return kTypeOf<Logit>;
  }
  __device__ bool with_loss() const { return plan_.loss.data; }
  __device__ bool with_gradient() const { return plan_.gradient.data; }
  __device__ bool given(ModifierName name) const {
    return !(kFocal && name == kPosWeight) && plan_.modifiers[name].data;
  }
  // Whether a turn has all of its elements.
  __device__ bool is_full() const { return left_ >= kLast; }
  __device__ static bool any_of_warp(bool value) { return __any_sync(0xffffffff, value); }

  __device__ void advance(int elements) {
    left_ -= elements;
    element_ += elements;
    place_ += elements;
    if constexpr (kModified) column_ += elements;
  }

  // Whether common turns multiply by the factor and round as they should. A gradient of 16-bit
  // logits may be float32, to be scaled before it is rounded.
  __device__ bool is_usual() const {
    const auto fits = [&](const Result& result) { return !result.data || result.type == type(); };
    bool usual = power_ == 1 && (plan_.reduce || fits(plan_.loss));
    if constexpr (kNarrow) {
      const Scalar divisor = L::magnitude(divisor_);
      usual = usual && divisor > 0x1p-60f && divisor < 0x1p60f;
    }
    return usual && (fits(plan_.gradient) || (kNarrow && plan_.gradient.type == Type::kF32));
  }

  __device__ void clear() {
    const Scalar zeros[kQuad] = {};
#pragma unroll 1
    for (; left_ > 0; advance(32)) {
      if (with_loss() && !plan_.reduce) store(plan_.loss, element_, left_, zeros);
      if (with_gradient()) store(plan_.gradient, element_, left_, zeros);
    }
  }

  // What all turns of the elements from `begin` on share.
  __device__ void prepare(int64_t begin) {
    if constexpr (kModified) {
      if (plan_.inner) {
        row_ = begin / plan_.inner;
        // Without elements, that of the first octet, as in common_turns.
        column_ = static_cast<uint32_t>(begin - row_ * plan_.inner) +
                  (there_ ? static_cast<uint32_t>(element_ - begin) : threadIdx.x % 8 * kQuad);
      }
    }
    if (kModified && given(kIgnoreLabel) && plan_.common_modifiers) {
      const Input& input = plan_.modifiers[kIgnoreLabel];
      ignored_ = width_of(input.type) == 4   ? *static_cast<const uint32_t*>(input.data)
                 : width_of(input.type) == 1 ? *static_cast<const uint8_t*>(input.data)
                                             : 0;
      ignored_number_ = number_at<Scalar>(input.data, input.type, 0);
    }
    if (plan_.labels.form == Form::kOne) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        labels_[q] = {};
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) set_label(q, c, 0);
      }
    }
  }

  template <class Stored>
  __device__ static auto* place(const void* data, Type type, int64_t element) {
    if constexpr (std::is_same_v<Stored, Any>)
      return in_register(static_cast<const char*>(data) + element * width_of(type));
    else
      return in_register(static_cast<const Stored*>(data) + element);
  }
  __device__ void point() {
    logits_from_ = place<Logit>(plan_.logits.data, type(), element_);
    labels_from_ = place<Label>(plan_.labels.data, plan_.labels.type, element_);
    gradient_to_ =
        const_cast<decltype(gradient_to_)>(place<Logit>(plan_.gradient.data, type(), element_));
  }

  // Loads a turn, in the distance `at` from the thread's element.
  __device__ void fetch(int at, bool aligned) {
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kAnyLogit) {
        if (type() == Type::kF32) {
          const auto* from = reinterpret_cast<const float*>(logits_from_);
          logits_[q] = Logits::load(from + at + 32 * q, aligned);
        } else {
          const auto* from = reinterpret_cast<const uint16_t*>(logits_from_);
          float values[kQuad];
          read_pairs(Quad<uint16_t>::load(from + at + 32 * q, aligned), values);
          logits_[q] = Logits::rounded(values);
        }
      } else {
        logits_[q] = Logits::load(logits_from_ + at + 32 * q, aligned);
      }
    }
    if (plan_.labels.form != Form::kEach) return;
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kAny)
        labels_[q].load(plan_.labels.type, labels_from_, at + 32 * q, aligned);
      else
        labels_[q] = Labels::load(labels_from_ + at + 32 * q, aligned);
    }
  }
  __device__ void set_logit(int q, int c, int64_t at) {
    if constexpr (kAnyLogit)
      logits_[q].set(c, number_at<Scalar>(plan_.logits.data, type(), at));
    else
      logits_[q].set(c, static_cast<const Logit*>(plan_.logits.data)[at]);
  }
  __device__ void set_label(int q, int c, int64_t at) {
    if constexpr (kAny)
      labels_[q].set(c, plan_.labels.type, plan_.labels.data, at);
    else
      labels_[q].set(c, static_cast<const Label*>(plan_.labels.data)[at]);
  }

  // Loads the elements of a turn that is not full. Where there are none, logit and label have a
  // loss of exactly 0.
  __device__ void gather() {
    constexpr Scalar kInfinity = Format<Scalar>::kInfinity;
    const Scalar absent[kQuad] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      logits_[q] = rounded(absent), labels_[q] = {};
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const int64_t element = element_ + 32 * q + c;
        if (32 * q + c >= left_) continue;
        set_logit(q, c, element);
        set_label(q, c, plan_.labels.form == Form::kOne ? 0 : element);
      }
    }
  }
  __device__ void read_logits(const Logits& logits, Scalar* x) const {
    if constexpr (sizeof(Logit) == 2) {
      read_pairs(logits, x);
    } else {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) x[c] = convert(logits.get(c));
    }
  }
  __device__ void read_labels(const Labels& labels, Scalar* y) const {
    if constexpr (kAny) {
      labels.get(plan_.labels.type, y);
    } else {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        if constexpr (std::is_same_v<Label, uint8_t>)
          y[c] = label_of<Scalar>(plan_.labels.type, labels.get(c));
        else
          y[c] = convert(labels.get(c));
      }
    }
  }

  // Of 16-bit logits: pairs of them to and from float32.
  __device__ Scalar of_pair(uint32_t pair, bool second) const {
    return type() == Type::kF16 ? convert_pair(__half(), pair, second)
                                : convert_pair(__nv_bfloat16(), pair, second);
  }
  template <class Stored>
  __device__ void read_pairs(const Quad<Stored>& pairs, Scalar* x) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c)
      x[c] = of_pair(c < 2 ? pairs.vectors[0].x : pairs.vectors[0].y, c % 2);
  }
  __device__ uint32_t to_pair(Scalar first, Scalar second) const {
    uint32_t bits;
    if (type() == Type::kF16) {
      const auto pair = round_pair(__half(), first, second);
      memcpy(&bits, &pair, sizeof bits);
    } else {
      const auto pair = round_pair(__nv_bfloat16(), first, second);
      memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
  }
  __device__ Logits rounded(const Scalar* values) const {
    if constexpr (sizeof(Logit) == 2) {
      Logits quad;
      quad.vectors[0].x = to_pair(values[0], values[1]);
      quad.vectors[0].y = to_pair(values[2], values[3]);
      return quad;
    } else {
      return Logits::rounded(values);
    }
  }

  __device__ static bool is_common(Scalar x) { return L::magnitude(x) <= Format<Scalar>::kCommon; }

  // A turn as the loops of common turns take it: logits, turned to a label of 0, and what labels of
  // 1 turn: factors of 1 and -1, or the sign bits of pairs of 16-bit numbers. Or, if labels are
  // soft, logits and labels as they are.
  template <bool kSoft>
  struct Turn {
    Scalar x[kQuads][kQuad];
    std::conditional_t<kNarrow && !kSoft, uint32_t[kQuads][2], Scalar[kQuads][kQuad]> labels;
    typename L::Bits soft = 0;  // 0 if all labels are 0 or 1
    uint32_t ignored = 0;       // a bit for each
    bool common = true;
  };

  // Evaluates common turns, of up to `size` elements of each thread. Returns where there is another
  // kind of turn.
  __device__ int common_turns(int size, int octet) {
    if constexpr (kFocal || (kModified && sizeof(Logit) == 8)) return 0;
    if (!usual_ || !plan_.dense) return 0;
    if (kModified && (!plan_.common_modifiers || smoothing_ != 0)) return 0;
    // A thread without elements evaluates those of the first octet once more, and keeps nothing.
    if (!there_) element_ -= octet * 256;
    int at = 0;
    if constexpr (kModified) {
      at = plan_.uses == 1u << kWeight ? turns<false, true, true, true>(size)
                                       : turns<false, true>(size);
    } else if constexpr (kFewLoops) {
      at = soft_ ? turns<true, false>(size) : turns<false, false>(size);
    } else if (soft_ && !plan_.direct) {
      soft_ = smoothing_ != 0;  // the next one may be hard again
    } else if (soft_) {
      at = turns<true, true>(size);
    } else if (!plan_.direct) {
      at = turns<false, false>(size);
    } else {
      at = with_gradient() ? turns<false, true, true>(size) : turns<false, true, false>(size);
    }
    if (!there_) element_ += octet * 256;
    advance(at);
    return at;
  }

  // kDirect: the results have the logits' type, and all quads are aligned.
  template <bool kSoft, bool kDirect, bool kGradient = true, bool kWeightOnly = false>
  __device__ int turns(int size) {
    point();
    fetch(0, kDirect || plan_.aligned);
    int at = 0;
#pragma unroll 1
    for (; at < size; at += kStep) {
      Turn<kSoft> turn;
      if constexpr (kSoft)
        read(&turn);
      else
        read_turned<kModified && !kWeightOnly>(&turn);
      const bool is_hard = turn.soft == 0;
      if (any_of_warp(!turn.common || !(is_hard || (kSoft && (kNarrow || smoothing_ == 0))))) {
        if (!kSoft) soft_ = any_of_warp(!is_hard);
        return at;
      }
      // Without a condition, as that would take copies of all registers: the last turn loads its
      // own quads again.
      fetch(at + kStep < size ? at + kStep : at, kDirect || plan_.aligned);
      Scalar sums[kQuad] = {};
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        if constexpr (kSoft)
          evaluate_soft<kDirect>(at + 32 * q, turn.x[q], turn.labels[q]);
        else if constexpr (kModified)
          evaluate_weighted<kWeightOnly>(at + 32 * q, turn.x[q], turn.labels[q],
                                         turn.ignored >> 4 * q);
        else if constexpr (kNarrow)
          evaluate_narrow<kDirect, kGradient>(at + 32 * q, turn.x[q], turn.labels[q], sums);
        else
          evaluate_turned<kDirect, kGradient>(at + 32 * q, turn.x[q], turn.labels[q]);
      }
      // Common losses cannot overflow, and these few additions lose less than the contract allows.
      if constexpr (kNarrow && !kSoft) high_[0] += (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
    if (kSoft) {
      Turn<false> turn;
      read_turned(&turn);
      soft_ = smoothing_ != 0 || any_of_warp(turn.soft != 0);
    }
    return at;
  }

  __device__ void read(Turn<true>* turn) const {
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      read_logits(logits_[q], turn->x[q]);
      read_labels(labels_[q], turn->labels[q]);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Scalar x = turn->x[q][c], y = turn->labels[q][c];
        turn->common &= is_common(x) && L::magnitude(y) <= 1;
        if (kNarrow) turn->common &= y >= 0;
        turn->soft |= L::to_bits(L::fma(y, y, -y));
      }
    }
  }

  // kIgnores: an ignored label counts as 0.
  template <bool kIgnores = false>
  __device__ void read_turned(Turn<false>* turn) const {
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      const Logits& logits = logits_[q];
      auto* labels = turn->labels[q];
      if constexpr (kNarrow) {
        if constexpr (std::is_same_v<Label, uint8_t>) {
          const uint32_t word = labels_[q].vectors[0];
          labels[0] = __byte_perm(word << 7, 0, 0x1404);
          labels[1] = __byte_perm(word << 7, 0, 0x3424);
          turn->soft |= word & 0xfefefefe;
        } else if constexpr (std::is_same_v<Label, __nv_bfloat16>) {
          const uint2 words = labels_[q].vectors[0];
          const auto sign = [&](uint32_t ones) {  // of two labels, each 0x3f80 or 0
            const uint32_t signs = ones << 8 & 0x80008000;
            turn->soft |= ones ^ (signs >> 8) * 0x7f;
            return signs;
          };
          labels[0] = sign(words.x), labels[1] = sign(words.y);
        } else {
          labels[0] = labels[1] = 0;
          Scalar y[kQuad];
          read_labels(labels_[q], y);
          BCE_UNROLL
          for (int c = 0; c < kQuad; ++c) {
            turn->soft |= L::to_bits(L::fma(y[c], y[c], -y[c]));
            if (y[c] == 1) labels[c / 2] |= c % 2 ? 0x80000000 : 0x8000;
          }
        }
        const uint32_t pairs[] = {in_register(logits.vectors[0].x ^ labels[0]),
                                  in_register(logits.vectors[0].y ^ labels[1])};
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) turn->x[q][c] = of_pair(pairs[c / 2], c % 2);
      } else {
        if constexpr (std::is_same_v<Label, uint8_t>)
          turn_by_bytes<kIgnores>(labels_[q].vectors[0], q, turn);
        else if (kAny && kWidths & 1 && width_of(plan_.labels.type) == 1)
          turn_by_bytes<kIgnores>(word_of(labels_[q]), q, turn);
        else
          turn_by_numbers<kIgnores>(q, turn);
        Scalar x[kQuad];
        read_logits(logits, x);
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) turn->x[q][c] = in_register(x[c] * labels[c]);
      }
      if constexpr (!kNarrow) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) turn->common &= is_common(turn->x[q][c]);
      }
    }
    if constexpr (kNarrow) {
      uint32_t largest = 0;
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q)
        largest = with_pair(with_pair(largest, logits_[q].vectors[0].x), logits_[q].vectors[0].y);
      constexpr Scalar kCommon = Format<Scalar>::kCommon;
      turn->common = all_within(largest, type() == Type::kF16 ? bits_of<__half>(kCommon)
                                                              : bits_of<__nv_bfloat16>(kCommon));
    }
  }

  __device__ static uint32_t word_of(const Labels& labels, int i = 0) {
    if constexpr (kAny)
      return labels.word(i);
    else
      return 0;
  }

  template <bool kIgnores>
  __device__ void turn_by_bytes(uint32_t word, int q, Turn<false>* turn) const {
    if (kIgnores && uses(kIgnoreLabel)) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        if ((word >> 8 * c & 0xff) != ignored_) continue;
        turn->ignored |= 1u << (kQuad * q + c);
        word &= ~(0xffu << 8 * c);
      }
    }
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c)
      turn->labels[q][c] = L::from_bits(L::to_bits(1) | typename L::Bits{word >> 8 * c & 1}
                                                            << (8 * sizeof(Scalar) - 1));
    turn->soft |= word & 0xfefefefe;
  }

  template <bool kIgnores>
  __device__ void turn_by_numbers(int q, Turn<false>* turn) const {
    Scalar labels[kQuad];
    read_labels(labels_[q], labels);
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      Scalar y = labels[c];
      if (kIgnores && uses(kIgnoreLabel)) {
        const bool ignored = plan_.labels.type == Type::kI32 ? word_of(labels_[q], c) == ignored_
                                                             : y == ignored_number_;
        turn->ignored |= ignored ? 1u << (kQuad * q + c) : 0;
        y = ignored ? 0 : y;
      }
      turn->labels[q][c] = in_register(turn_of<L>(y));
      turn->soft |= L::to_bits(L::fma(y, y, -y));
    }
  }

  // Adds up the losses of a quad, or puts them into the tile, or else calls `store`.
  template <class Store>
  __device__ void keep(int at, const Pair<Scalar>* losses, const Store& store) {
    if (plan_.losses == Losses::kSum) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        high_[c] += losses[c].high;
        low_[c] += losses[c].low;
      }
    } else if (plan_.losses == Losses::kTile) {
      constexpr int kVectors = kQuad * sizeof(Pair<Scalar>) / sizeof(uint4);
      uint4 vectors[kVectors];
      memcpy(vectors, losses, sizeof vectors);
      BCE_UNROLL
      for (int i = 0; i < kVectors; ++i)
        reinterpret_cast<uint4*>(tile<Scalar>() + spread(place_ + at))[i] = vectors[i];
    } else if (with_loss()) {
      store();
    }
  }

  template <bool kDirect, bool kGradient>
  __device__ void evaluate_turned(int at, const Scalar* z, const Scalar* turns) {
    Exponential<L> exponential[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) exponential[c] = exp_of<L, true>(z[c]);
    Pair<Scalar> losses[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) losses[c] = turned_loss_of<L>(z[c], exponential[c]);
    keep(at, losses, [&] {
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] = rest_ * rounded_once(losses[c], type());
      put<kDirect>(plan_.loss, at, rounded(values));
    });
    if (kGradient && (kDirect || with_gradient())) {
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        values[c] =
            rest_ * turns[c] * rounded_once(turned_gradient_of<L>(z[c], exponential[c]), type());
      put<kDirect>(plan_.gradient, at, rounded(values));
    }
  }

  // With modifiers. `masked` has a bit for each element that is to be ignored.
  template <bool kWeightOnly>
  __device__ void evaluate_weighted(int at, const Scalar* z, const Scalar* turns, uint32_t masked) {
    Pair<Scalar> weight[kQuad];
    if constexpr (kWeightOnly) {
      Scalar numbers[kQuad];
      load_quad(plan_.modifiers[kWeight], at, numbers);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) weight[c] = {numbers[c], 0};
    } else {
      load_weights(at, turns, weight, &masked);
    }
    Exponential<L> exponential[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) exponential[c] = exp_of<L, true>(z[c]);
    Pair<Scalar> losses[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) losses[c] = turned_loss_of<L>(z[c], exponential[c]);
    const auto put_weighted = [&](const Result& result, Scalar* values) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        values[c] = weighted<L, true>({values[c], 0}, weight[c].high).high * rest_;
      if (!kWeightOnly &&
          (uses(kWhere) || uses(kIgnoreLabel))) {  // a NaN or negative factor would show
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) values[c] = masked >> c & 1 ? 0 : values[c];
      }
      put_as_logits(result, at, values);
    };
    Pair<Scalar> products[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) products[c] = weighted<L, true>(losses[c], weight[c]);
    Scalar values[kQuad];
    keep(at, products, [&] {
      round_once(losses, type(), values);
      put_weighted(plan_.loss, values);
    });
    if (with_gradient()) {
      Pair<Scalar> gradients[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) gradients[c] = turned_gradient_of<L>(z[c], exponential[c]);
      round_once(gradients, type(), values);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] *= turns[c];
      put_weighted(plan_.gradient, values);
    }
  }

  __device__ bool uses(ModifierName name) const { return plan_.uses >> name & 1; }

  // The weights of a quad, 0 if masked. They are loaded where they are needed: other warps evaluate
  // meanwhile.
  __device__ void load_weights(int at, const Scalar* turns, Pair<Scalar>* weight,
                               uint32_t* masked) const {
    const auto load = [&](ModifierName name, auto* numbers) {
      load_quad(plan_.modifiers[name], at, numbers);
    };
    Scalar numbers[kQuad] = {1, 1, 1, 1};
    if (uses(kWeight)) load(kWeight, numbers);
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) weight[c] = {numbers[c], 0};
    if (uses(kSampleWeight)) {
      load(kSampleWeight, numbers);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) weight[c] = product_of<L>(weight[c], numbers[c]);
    }
    if (uses(kPosWeight)) {
      load(kPosWeight, numbers);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        weight[c] = weight_of<L>(weight[c], numbers[c], turns[c] < 0 ? 1 : 0, 0).weight;
    }
    if (uses(kWhere)) {
      uint8_t where[kQuad];
      load(kWhere, where);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) *masked |= where[c] ? 0 : 1u << c;
    }
    if (uses(kWhere) || uses(kIgnoreLabel)) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        if (*masked >> c & 1) weight[c] = {0, 0};
    }
  }

  // A modifier's numbers, from the element in the distance `at`, or its column or row.
  template <class Number>
  __device__ void load_quad(const Input& input, int at, Number* numbers) const {
    const Number* data = static_cast<const Number*>(input.data);
    const auto load = [&](const Number* from) {
      const auto quad = __ldg(reinterpret_cast<const typename Quad<Number>::Vector*>(from));
      memcpy(numbers, &quad, sizeof quad);
    };
    const auto row_of = [&](uint32_t column) {
      return __umulhi(column, plan_.magic) >> plan_.shift;
    };
    const uint32_t column = column_ + at, row = row_of(column);
    if (plan_.whole_quads && input.form == Form::kByColumn) {
      load(data + (column - row * plan_.inner));
    } else if (plan_.whole_quads && input.form == Form::kEach) {
      load(data + element_ + at);
    } else if (plan_.whole_quads || input.form == Form::kOne) {
      const Number number = __ldg(data + (input.form == Form::kOne ? 0 : row_ + row));
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) numbers[c] = number;
    } else {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const uint32_t row = row_of(column + c);
        numbers[c] = __ldg(data + (input.form == Form::kEach       ? element_ + at + c
                                   : input.form == Form::kByColumn ? column + c - row * plan_.inner
                                                                   : row_ + row));
      }
    }
  }

  template <bool kDirect, bool kGradient>
  __device__ void evaluate_narrow(int at, const Scalar* z, const uint32_t* signs, Scalar* sums) {
    Narrow<L> narrow[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) narrow[c] = narrow_of<L, kDigits>(z[c]);
    Scalar losses[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) losses[c] = L::fma(2, narrow[c].half_log1p, L::max(z[c], 0));
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) sums[c] += losses[c];
    if (plan_.losses != Losses::kSum) {
      Pair<Scalar> pairs[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) pairs[c] = {losses[c], 0};
      keep(at, pairs, [&] {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) losses[c] *= rest_;
        put<kDirect>(plan_.loss, at, rounded(losses));
      });
    }
    if (kGradient && (kDirect || with_gradient())) {
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Scalar e = narrow[c].e;
        values[c] = hard_gradient_of<L>(z[c], e, L::fma(e, divisor_, divisor_));
      }
      if (kDirect || plan_.gradient.type == type()) {
        Logits quad = rounded(values);
        quad.vectors[0].x ^= signs[0];
        quad.vectors[0].y ^= signs[1];
        put<kDirect>(plan_.gradient, at, quad);
      } else {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t sign = signs[c / 2] << (c % 2 ? 0 : 16) & 0x80000000;
          values[c] = L::from_bits(L::to_bits(values[c]) ^ sign);
        }
        put<kDirect>(plan_.gradient, at, Quad<Scalar>::rounded(values));
      }
    }
  }

  template <bool kDirect>
  __device__ void evaluate_soft(int at, const Scalar* x, const Scalar* y) {
    Pair<Scalar> losses[kQuad];
    Scalar gradients[kQuad];
    if constexpr (kNarrow) {
      const Scalar smoothing[kQuad] = {smoothing_, smoothing_, smoothing_, smoothing_};
      evaluate_narrow_quad<true>(x, y, smoothing, losses, gradients);
    } else {
      Exponential<L> exponential[kQuad];
      Pair<Scalar> coefficients[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        exponential[c] = exp_of<L, true>(x[c]);
        coefficients[c] = coefficient_of<L>(x[c], y[c]);
      }
      if (smoothing_ != 0) {  // then they are 0 or 1
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c)
          coefficients[c] = coefficients[c].high == 0 ? smoothed_[0] : smoothed_[1];
      }
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        losses[c] = loss_from<L, true>(x[c], coefficients[c], log1p_of<L>(exponential[c]), 1);
        if (!plan_.reduce) losses[c].high = rounded_once(losses[c], type()) * rest_;
      }
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        gradients[c] =
            rounded_once(gradient_from<L>(x[c], coefficients[c], sigmoid_of<L>(exponential[c]), 1),
                         type()) *
            rest_;
    }
    keep(at, losses, [&] {
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] = losses[c].high;
      put<kDirect>(plan_.loss, at, rounded(values));
    });
    if (!with_gradient()) return;
    if (kNarrow && !kDirect && plan_.gradient.type != type())
      put<kDirect>(plan_.gradient, at, Quad<Scalar>::rounded(gradients));
    else
      put<kDirect>(plan_.gradient, at, rounded(gradients));
  }

  // Stores a quad in the distance `at` from the thread's element.
  template <bool kDirect, class Stored>
  __device__ void put(const Result& result, int at, const Quad<Stored>& quad) const {
    Stored* to = static_cast<Stored*>(result.data) + element_ + at;
    if constexpr (kAnyLogit || std::is_same_v<Stored, Logit>)
      if (&result == &plan_.gradient) to = reinterpret_cast<Stored*>(gradient_to_) + at;
    if (kDirect || plan_.aligned)
      quad.store(to, there_);
    else
      quad.store_each(to, there_);
  }
  // The same of any logits' type.
  __device__ void put_as_logits(const Result& result, int at, const Scalar* values) const {
    if (type() == Type::kF32)
      put<true>(result, at, Quad<float>::rounded(values));
    else if (type() == Type::kF16)
      put<true>(result, at, Quad<__half>::rounded(values));
    else
      put<true>(result, at, Quad<__nv_bfloat16>::rounded(values));
  }

  // A turn of any elements.
  __device__ void any_turn() {
    if (plan_.dense) {
      point();
      if (is_full())
        fetch(0, false);
      else
        gather();
    }
#pragma unroll 1
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kModified)
        modified_quad();
      else
        plain_quad();
      BCE_UNROLL
      for (int next = 1; next < kQuads; ++next) {
        logits_[next - 1] = logits_[next];
        labels_[next - 1] = labels_[next];
      }
      advance(32);
    }
  }

  __device__ void plain_quad() {
    if (left_ <= 0) return;
    Scalar x[kQuad], y[kQuad], smoothing[kQuad];
    read_logits(logits_[0], x);
    read_labels(labels_[0], y);
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) smoothing[c] = c < left_ ? smoothing_ : 0;
    Pair<Scalar> losses[kQuad] = {};
    Scalar gradients[kQuad] = {};
    if constexpr (kNarrow)
      evaluate_narrow_quad<false>(x, y, smoothing, losses, gradients);
    else
      evaluate_quad(x, y, smoothing, losses, gradients);
    finish_quad(losses, gradients);
  }

  // Adds up or stores a quad's losses, and stores its gradients.
  __device__ void finish_quad(const Pair<Scalar>* losses, const Scalar* gradients) {
    keep(0, losses, [] {});
#pragma unroll 1
    for (int result = 0; result < 2; ++result) {
      if (result == 0 ? !with_loss() || plan_.reduce : !with_gradient()) continue;
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] = result == 0 ? losses[c].high : gradients[c];
      store(result == 0 ? plan_.loss : plan_.gradient, element_, left_, values);
    }
  }

  __device__ Scalar scaled(Pair<Scalar> value, Type type) const {
    return rounded_once(value, type) * power_ * rest_;
  }
  __device__ Pair<Scalar> scaled_loss(Pair<Scalar> value) const {
    if (!plan_.reduce) return {scaled(value, plan_.loss.type), 0};
    return {value.high * power_, value.low * power_};
  }

  // Each value is scaled and rounded once, or, if it is to be added up, has its power.
  __device__ void evaluate_quad(const Scalar* x, const Scalar* y, const Scalar* smoothing,
                                Pair<Scalar>* losses, Scalar* gradients) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      const Exponential<L> exponential = exp_of<L>(x[c]);
      losses[c] = scaled_loss(loss_of<L>(x[c], y[c], smoothing[c], exponential));
      gradients[c] =
          scaled(gradient_of<L>(x[c], y[c], smoothing[c], exponential), plan_.gradient.type);
    }
  }

  static constexpr int kDigits = std::is_same_v<Logit, __nv_bfloat16> ? 8 : 11;  // or fewer

  // 16-bit logits. For labels of 0 and 1, gives the same bits as evaluate_narrow. Each element is
  // evaluated as its own value asks, so that its bits do not depend on its neighbors.
  template <bool kCommon>
  __device__ void evaluate_narrow_quad(const Scalar* x, const Scalar* y, const Scalar* smoothing,
                                       Pair<Scalar>* losses, Scalar* gradients) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      if (kCommon || (usual_ && is_narrow(L::magnitude(x[c])) && y[c] >= 0 && y[c] <= 1)) {
        const Narrow<L> narrow = narrow_of<L, kDigits>(x[c]);
        const Scalar coefficient = soft_coefficient_of(x[c], y[c], smoothing[c]);
        losses[c] = {L::fma(2, narrow.half_log1p, coefficient * L::magnitude(x[c])), 0};
        if (!plan_.reduce) losses[c].high *= rest_;
        gradients[c] = soft_gradient_of<L>(x[c], coefficient, narrow.e, divisor_);
      } else {
        const Exponential<L> exponential = exp_of<L>(x[c]);
        losses[c] = scaled_loss(loss_of<L>(x[c], y[c], smoothing[c], exponential));
        gradients[c] =
            scaled(gradient_of<L>(x[c], y[c], smoothing[c], exponential), plan_.gradient.type);
      }
    }
  }

  // A quad with modifiers. A masked element is replaced by a harmless one.
  __device__ void modified_quad() {
    Scalar x[kQuad], y[kQuad], rest[kQuad], power[kQuad], pos_weight[kQuad], number[kQuad];
    Pair<Scalar> weight[kQuad];
    bool exists[kQuad], fast = smoothing_ == 0 && plan_.smoothing.form == Form::kOne;
    int64_t row = 0;
    uint32_t column = 0;
    if (plan_.inner) {
      const uint32_t quotient = __umulhi(column_, plan_.magic) >> plan_.shift;
      row = row_ + quotient;
      column = column_ - quotient * plan_.inner;
    }
    const auto load = [&](const Input& input) { numbers(input, row, column, number); };
    if (plan_.dense) {
      read_logits(logits_[0], x);
      read_labels(labels_[0], y);
    } else {
      numbers(plan_.logits, row, column, x);
      numbers(plan_.labels, row, column, y);
    }
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      exists[c] = c < left_;
      rest[c] = rest_;
      power[c] = power_;
      weight[c] = {1, 0};
      pos_weight[c] = 1;
    }
    if (plan_.factors == Factors::kAny) {
#pragma unroll 1
      for (int c = 0; c < kQuad; ++c) {
        const Factor<Scalar> factor =
            c < left_ ? plan_.factor_at<Scalar>(element_ + c) : Factor<Scalar>(0, 1);
        BCE_UNROLL
        for (int next = 1; next < kQuad; ++next) {
          rest[next - 1] = rest[next];
          power[next - 1] = power[next];
          exists[next - 1] = exists[next];
        }
        rest[kQuad - 1] = factor.rest;
        power[kQuad - 1] = static_cast<Scalar>(factor.power);
        exists[kQuad - 1] = !factor.is_zero();
      }
    }
    if (given(kIgnoreLabel)) ignore(y, exists);
    if (given(kWhere)) {
      load(plan_.modifiers[kWhere]);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) exists[c] = exists[c] && number[c] != 0;
    }
    if (given(kWeight)) {
      load(plan_.modifiers[kWeight]);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) weight[c].high = number[c];
    }
    if (given(kSampleWeight)) {
      load(plan_.modifiers[kSampleWeight]);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) weight[c] = product_of<L>(weight[c], number[c]);
    }
    if (given(kPosWeight)) load(plan_.modifiers[kPosWeight]);
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      if (given(kPosWeight)) pos_weight[c] = number[c];
      if (!exists[c]) {
        x[c] = y[c] = 0;
        weight[c] = {0, 0};
        pos_weight[c] = 1;
        rest[c] = 0;  // a NaN or negative factor would show
        power[c] = 1;
      }
      fast = fast && is_common(x[c]) && L::to_bits(L::fma(y[c], y[c], -y[c])) == 0 && power[c] == 1;
    }
    // From here on, the weights become the losses.
    Scalar gradients[kQuad] = {};
    if constexpr (kFocal) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        weight[c] = {weight[c].high * power[c], weight[c].low * power[c]};
      evaluate_focal(x, y, row, column, rest, weight, gradients);
    } else if (plan_.total) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        weight[c] = finite_low<L>({weight[c].high * power[c], weight[c].low * power[c]});
    } else if (!any_of_warp(!fast)) {
      if (given(kPosWeight)) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c)
          weight[c] = weight_of<L>(weight[c], pos_weight[c], y[c], 0).weight;
      }
      evaluate_weighted<true>(x, y, nullptr, rest, weight, nullptr, gradients);
    } else {
      Scalar smoothing[kQuad];
      numbers(plan_.smoothing, row, column, smoothing);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const auto own = weight_of<L>({weight[c].high * power[c], weight[c].low * power[c]},
                                      pos_weight[c], y[c], smoothing[c]);
        weight[c] = own.weight;
        pos_weight[c] = own.pos_weight;
      }
      evaluate_weighted<false>(x, y, smoothing, rest, weight, pos_weight, gradients);
    }
    if (left_ > 0) finish_quad(weight, gradients);
  }

  template <bool kFast>
  __device__ void evaluate_weighted(const Scalar* x, const Scalar* y, const Scalar* smoothing,
                                    const Scalar* rest, Pair<Scalar>* weight,
                                    const Scalar* pos_weight, Scalar* gradients) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      const Scalar s = kFast ? 0 : smoothing[c], q = kFast ? 1 : pos_weight[c];
      const Exponential<L> exponential = exp_of<L, kFast>(x[c]);
      const auto result = [&](Pair<Scalar> value, Type type) {
        return weighted<L, kFast>({rounded_once(value, type), 0}, weight[c].high).high * rest[c];
      };
      if (with_gradient())
        gradients[c] = result(gradient_of<L, kFast, !kFast>(x[c], y[c], s, exponential, q),
                              plan_.gradient.type);
      if (!with_loss()) continue;
      const Pair<Scalar> loss = loss_of<L, kFast, !kFast>(x[c], y[c], s, exponential, q);
      if (plan_.reduce)
        weight[c] = weighted<L, kFast>(loss, weight[c]);
      else
        weight[c] = {result(loss, plan_.loss.type), 0};
    }
  }

  // An element at a time: the compiler takes its time for these formulas.
  __device__ void evaluate_focal(const Scalar* x, const Scalar* y, int64_t row, uint32_t column,
                                 const Scalar* rest, Pair<Scalar>* weight, Scalar* gradients) {
    struct Element {
      Scalar x, y, smoothing, rest;
      Scalar numbers[kClip - kAlpha + 1];
    } elements[kQuad];
    Scalar numbers_of_quad[kQuad];
    numbers(plan_.smoothing, row, column, numbers_of_quad);
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) elements[c] = {x[c], y[c], numbers_of_quad[c], rest[c], {}};
    BCE_UNROLL
    for (int name = kAlpha; name <= kClip; ++name) {
      const Input& input = plan_.modifiers[name == kGammaPos && !given(kGammaPos) ? kGamma : name];
      if (!input.data) continue;
      numbers(input, row, column, numbers_of_quad);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) elements[c].numbers[name - kAlpha] = numbers_of_quad[c];
    }
#pragma unroll 1
    for (int c = 0; c < kQuad; ++c) {
      const Element element = elements[0];
      const auto number = [&](ModifierName name) { return element.numbers[name - kAlpha]; };
      const FocalResult<Scalar> result =
          focal_of(element.x, element.y, element.smoothing,
                   focus_of(number(kGamma), number(kGammaPos), number(kClip)));
      Pair<Scalar> loss = weight[0];
      if (given(kAlpha))
        loss = product_of<L>(loss, balance_of<L>(number(kAlpha), element.y, element.smoothing));
      const auto scaled = [&](Scalar value) {
        return weighted<L>(Pair<Scalar>{value, 0}, loss.high).high * element.rest;
      };
      const Scalar gradient = scaled(result.gradient);
      if (plan_.reduce)
        loss = weighted<L>(result.loss, loss);
      else
        loss = {scaled(rounded_once(result.loss, plan_.loss.type)), 0};
      BCE_UNROLL
      for (int next = 1; next < kQuad; ++next) {
        elements[next - 1] = elements[next];
        weight[next - 1] = weight[next];
        gradients[next - 1] = gradients[next];
      }
      weight[kQuad - 1] = loss, gradients[kQuad - 1] = gradient;
    }
  }

  __device__ Focus<Scalar> focus_of(Scalar gamma_neg, Scalar gamma_pos, Scalar clip) {
    Focus<Scalar> focus = {gamma_neg, gamma_pos, 0, -0x1p100, 0, 0, 0};
    focus.integer_neg = integer_of(gamma_neg), focus.integer_pos = integer_of(gamma_pos);
    if (!given(kClip)) return focus;
    if (clip != clip_) {  // computed again
      clip_ = clip, clip_logit_ = {-0x1p100, 0};
      if (clip != 0) {
        const Pair<double> logit = logit_of<Lane<double>>(clip);
        clip_logit_.high = static_cast<Scalar>(logit.high);
        clip_logit_.low = static_cast<Scalar>(logit.high - clip_logit_.high + logit.low);
      }
    }
    focus.clip = clip, focus.clip_logit = clip_logit_.high, focus.clip_logit_low = clip_logit_.low;
    return focus;
  }
  // A gamma for product_power_of, or -1.
  __device__ static int integer_of(Scalar gamma) {
    return gamma == 0 || gamma == 1 || gamma == 2 || gamma == 4 ? static_cast<int>(gamma) : -1;
  }

  template <bool kClips, bool kProducts>
  __device__ FocalResult<Scalar> hard(Scalar x, Scalar y, const Focus<Scalar>& focus) const {
    const Exponential<L> exponential = exp_of<L, true, kClips>(x);
    HardFocal<L, kClips, kProducts> element = {};
    element.probabilities(x, y, exponential);
    if constexpr (kClips) element.clip(y, focus);
    element.logarithms(exponential);
    return element.result(y, focus, plan_.constant_power);
  }
  __device__ FocalResult<Scalar> focal_of(Scalar x, Scalar y, Scalar smoothing,
                                          const Focus<Scalar>& focus) const {
    const bool clips = given(kClip);
    if (is_hard<L>(x, y, smoothing)) {
      if constexpr (sizeof(Scalar) == 4)  // float64 has the same bits without it
        if (focus.integer_neg >= 0 && focus.integer_pos >= 0)
          return clips ? hard<true, true>(x, y, focus) : hard<false, true>(x, y, focus);
      return clips ? hard<true, false>(x, y, focus) : hard<false, false>(x, y, focus);
    }
    const auto exponential = clips ? exp_of<L, false, true>(x) : exp_of<L>(x);
    return soft_focal_of<L>(x, y, smoothing, exponential, focus, plan_.constant_power);
  }

  // A modifier's numbers for the quad, which begins in this row and column.
  __device__ void numbers(const Input& input, int64_t row, uint32_t column, Scalar* values) const {
    const bool one = input.form == Form::kOne;
    const bool whole = left_ >= kQuad && (input.form == Form::kEach || column + 3 < plan_.inner);
    if (one || (whole && input.form == Form::kByRow)) {
      const Scalar value = number_at<Scalar>(input.data, input.type, one ? 0 : row);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] = value;
      return;
    }
    const bool dense = input.form == Form::kEach || input.form == Form::kByColumn;
    const int64_t first = input.form == Form::kEach ? element_ : column;
    const void* from = static_cast<const char*>(input.data) + first * width_of(input.type);
    if (whole && dense && (input.type == Type::kF32 || width_of(input.type) == 1) &&
        is_aligned(from, kQuad * width_of(input.type))) {
      if (input.type == Type::kF32) {
        const uint4 words = __ldg(static_cast<const uint4*>(from));
        values[0] = __uint_as_float(words.x), values[1] = __uint_as_float(words.y);
        values[2] = __uint_as_float(words.z), values[3] = __uint_as_float(words.w);
      } else {
        const uint32_t word = __ldg(static_cast<const uint32_t*>(from));
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c)
          values[c] = label_of<Scalar>(input.type, static_cast<uint8_t>(word >> 8 * c));
      }
      return;
    }
#pragma unroll 1
    for (int c = 0; c < kQuad; ++c) {
      BCE_UNROLL
      for (int next = 1; next < kQuad; ++next) values[next - 1] = values[next];
      values[kQuad - 1] = 0;
      if (c >= left_) continue;
      const int64_t at = input.form == Form::kByColumn ? column
                         : input.form == Form::kByRow  ? row
                                                       : input.at(element_ + c);
      values[kQuad - 1] = number_at<Scalar>(input.data, input.type, at);
      if (++column == plan_.inner) column = 0, ++row;
    }
  }

  // Takes away the elements whose label, as stored, is to be ignored.
  __device__ void ignore(const Scalar* y, bool* exists) const {
    const Input &labels = plan_.labels, &ignored = plan_.modifiers[kIgnoreLabel];
    if (plan_.dense && ignored.form == Form::kOne && width_of(labels.type) < 8) {
      const uint32_t word =
          width_of(labels.type) == 4 ? *static_cast<const uint32_t*>(ignored.data) : 0;
      const Scalar number = number_at<Scalar>(ignored.data, ignored.type, 0);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        bool same = y[c] == number;
        if (labels.type == Type::kI32) same = labels_[0].word(c) == word;
        exists[c] = exists[c] && !same;
      }
      return;
    }
    uint32_t same = 0;
#pragma unroll 1
    for (int c = 0; c < kQuad && c < left_; ++c) {
      const int64_t element = element_ + c;
      if (same_number(labels.type, labels.data, labels.at(element), ignored.data,
                      ignored.at(element)))
        same |= 1u << c;
    }
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) exists[c] = exists[c] && !(same >> c & 1);
  }

  const Plan& plan_;
  const Scalar smoothing_;
  const Pair<Scalar> smoothed_[2];  // 0 and 1
  bool soft_;                       // the turn is probably one of soft labels
  bool zero_ = false, usual_ = false;
  Scalar rest_ = 0, power_ = 1, divisor_ = 1;
  // Whether the thread has elements in this group. In the turn: how many are left, which is the
  // first, and where its loss belongs in the tile.
  bool there_;
  int left_;
  int64_t element_;
  int place_;
  const std::conditional_t<kAnyLogit, char, Logit>* logits_from_;
  const std::conditional_t<kAny, char, Label>* labels_from_;
  std::conditional_t<kAnyLogit, char, Logit>* gradient_to_;
  Logits logits_[kQuads];
  Labels labels_[kQuads];
  // Of the matrix with plan_.inner columns: the row in which the group begins, and the turn's
  // distance from that row's begin.
  int64_t row_;
  uint32_t column_;
  // The ignored label as it is stored, if it is an integer, and as a number.
  uint32_t ignored_;
  Scalar ignored_number_;
  // Of a focal loss: the last clip, and its logit.
  Scalar clip_ = 0;
  Pair<Scalar> clip_logit_ = {-0x1p100, 0};
  double high_[kQuad];
  Scalar low_[kQuad];
};

}  // namespace
}  // namespace jax_bce
