// The loop over elements. A warp evaluates up to a group of consecutive elements of the results, a
// thread four at a time (a quad), in the order defined in bce_problem.h. While a thread evaluates
// some quads, it loads the next ones.
//
// A turn is evaluated in one of several ways, the same for the whole warp. Common turns have all of
// their elements, and logits within Format::kCommon of 0. There are loops for those of
//   - hard labels, 0 and 1, without smoothing: with and without a gradient, and for results and
//     operands of any type and alignment;
//   - soft labels, or hard ones that are smoothed;
//   - both, with modifiers of the usual types and forms.
// A focal loss has no such loop.
//
// Where another turn comes, the loop ends, the turn is evaluated an element at a time, which takes
// several times as long, and the loop begins again behind it. Only where logits are float32, and
// labels hard and float32 or a byte, does a logit far from 0, such as padding, cost little: if
// there is a gradient, and neither smoothing nor modifiers.
#pragma once

#include "bce_cuda_numbers.cuh"
#include "bce_focal.h"

namespace jax_bce {

#ifdef __CUDACC__
extern __shared__ uint4 shared_memory[];
#endif  // else the header that stands in for CUDA's has it

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
  enum { kLogits, kLabels, kSmoothing, kFirstModifier };
  Input inputs[kFirstModifier + kModifiersOfLosses];
  Input scale, divisor;
  const void* divisor_low;  // where the divisor is
  int width_of_logits, width_of_labels;
  Result loss, gradient;
  bool reduce, total, focal, constant_power;
  Losses losses;
  Factors factors;
  double inverse_count;
  int64_t rows, columns, groups_in_row;
  int tile_rows;      // 0: groups
  int count;          // of groups, or of tiles
  double* sums;       // of groups; if the loss has several parts, these
  int64_t parts;      // of the loss, or 1
  bool one_launch;    // whether its thread blocks wait for each other, and finish the rows
  bool two_launches;  // whether finish_rows follows
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
  // The same if logits are float32, there is a gradient, losses are to be added up, quads are
  // whole, and there is code for exactly these modifiers; else 0. Of several weights, sample_weight
  // is by row.
  uint32_t usual_modifiers;

  BCE_INLINE const Input& logits() const { return inputs[kLogits]; }
  BCE_INLINE const Input& labels() const { return inputs[kLabels]; }
  BCE_INLINE const Input& smoothing() const { return inputs[kSmoothing]; }
  BCE_INLINE const Input& modifier(int name) const { return inputs[kFirstModifier + name]; }

  template <class Scalar>
  __device__ Factor<Scalar> factor_at(int64_t element) const {
    double numbers[3] = {};
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {
      const Input& input = i == 0 ? scale : divisor;
      const auto* data = static_cast<const Scalar*>(i < 2 ? input.data : divisor_low);
      numbers[0] = numbers[1], numbers[1] = numbers[2];
      numbers[2] = data ? static_cast<double>(data[input.at(element)]) : i < 2 ? 1 : 0;
    }
    return {numbers[0] * inverse_count, numbers[1] + numbers[2]};
  }
};
static_assert(sizeof(Plan) <= 4096);  // as many bytes of parameters as any GPU takes

// In shared memory: a factor for each warp; in tiles, the first is that of all rows, if they share
// one.
template <class Scalar>
constexpr int kFactorBytes = kWarps * sizeof(Factor<Scalar>);
template <class Scalar>
__device__ Factor<Scalar>* factors_of_warps() {
  return reinterpret_cast<Factor<Scalar>*>(shared_memory);
}

// Behind them, the losses of a tile, and where they are: spread so that the threads that add up
// rows do not all use the same banks.
template <class Scalar>
__device__ Pair<Scalar>* tile() {
  static_assert(kFactorBytes<Scalar> % sizeof(uint4) == 0);
  return reinterpret_cast<Pair<Scalar>*>(shared_memory + kFactorBytes<Scalar> / sizeof(uint4));
}
__device__ int spread(int place) { return place + place / 32 * 2; }

// The modifiers that a loop of common turns is for: exactly these, or any of them. Nothing has to
// be decided in a loop that knows them.
constexpr uint32_t kOneWeight = 1u << kWeight;
constexpr uint32_t kWeights = kOneWeight | 1u << kSampleWeight | 1u << kPosWeight;
constexpr uint32_t kMasks = 1u << kWhere | 1u << kIgnoreLabel;

template <uint32_t kModifiersUsed>
struct Exactly {
  static constexpr bool kExact = true;
  static constexpr uint32_t kNames = kModifiersUsed;
  // Whether weights are products, which are pairs.
  static constexpr bool kPairs = (kNames & kWeights & (kNames - 1)) != 0;
};
struct AnyModifiers {
  static constexpr bool kExact = false, kPairs = true;
  static constexpr uint32_t kNames = kWeights | kMasks;
};

// kModified: elements may have modifiers, or the loss is focal.
template <class Logit, class Label, bool kModified>
class Loop {
 public:
  using Scalar = ScalarOf<Logit>;

  __device__ explicit Loop(const Plan& plan)
      : plan_(plan),
        smoothing_(plan.smoothing().form == Form::kOne
                       ? *static_cast<const Scalar*>(plan.smoothing().data)
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
  __device__ __forceinline__ double evaluate(int64_t begin, int size, int place) {
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
    for (int c = 0; c < kQuad; ++c) {
      // Where a weighted loss is infinite, its low part is NaN.
      if (!kModified || ::fabs(high_[c]) < Format<double>::kInfinity) high_[c] += low_[c];
    }
    return (high_[0] + high_[2]) + (high_[1] + high_[3]);
  }

 private:
  using L = Lane<Scalar>;
  static constexpr bool kAny = std::is_same_v<Label, Any>, kAnyLogit = std::is_same_v<Logit, Any>;
  // Whether some of what is the same in each turn is decided by branches, in fewer loops: the more
  // types a loop has, the longer it takes to compile.
  static constexpr bool kFewLoops = kAny || sizeof(Logit) == 8;
  // float32 logits, which may be padded with numbers far from 0.
  static constexpr bool kPads = std::is_same_v<Logit, float> && !kFewLoops && !kModified;
  // 16-bit logits without modifiers: of four, labels turn two words, and the formulas are shorter.
  static constexpr bool kNarrow = sizeof(Logit) == 2 && !kModified;
  // Quads evaluated together while as many more are loaded.
  static constexpr int kQuads = sizeof(Logit) == 8                          ? 1
                                : kNarrow && std::is_same_v<Label, uint8_t> ? 4
                                                                            : 2;
  static constexpr int kStep = 32 * kQuads;
  // Of labels in common turns. Those of bytes have kernels of their own where there are no
  // modifiers.
  static constexpr int kWidths = sizeof(Logit) == 8 ? 15 : kModified ? 7 : 14;
  using Logits = typename std::conditional_t<kAnyLogit, std::common_type<AnyQuad<Scalar, 6, true>>,
                                             std::common_type<Quad<Logit>>>::type;
  using Labels = typename std::conditional_t<kAny, std::common_type<AnyQuad<Scalar, kWidths>>,
                                             std::common_type<Quad<Label>>>::type;

  using Modifiers = std::conditional_t<kModified, AnyModifiers, Exactly<0>>;

  // Of the logits.
  __device__ Type type() const {
    if constexpr (kAnyLogit || std::is_same_v<Logit, uint16_t>)
      return plan_.logits().type;
    else
      return kTypeOf<Logit>;
  }
  __device__ Type type_of_labels() const {
    if constexpr (kAny || std::is_same_v<Label, uint8_t>)
      return plan_.labels().type;
    else
      return kTypeOf<Label>;
  }
  __device__ bool with_loss() const { return plan_.loss.data; }
  __device__ bool with_gradient() const { return plan_.gradient.data; }
  __device__ bool given(ModifierName name) const { return plan_.modifier(name).data; }
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
#pragma unroll 1
    for (int at = 0; at < left_; at += at % kQuad == kQuad - 1 ? 32 - kQuad + 1 : 1) {
      if (with_loss() && !plan_.reduce) store(plan_.loss, element_ + at, Scalar(0));
      if (with_gradient()) store(plan_.gradient, element_ + at, Scalar(0));
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
      const Input& input = plan_.modifier(kIgnoreLabel);
      nothing_ignored_ = 0;
      ignored_ = width_of(input.type) == 4   ? *static_cast<const uint32_t*>(input.data)
                 : width_of(input.type) == 1 ? *static_cast<const uint8_t*>(input.data)
                                             : 0;
      ignored_number_ = number_at<Scalar>(input.data, input.type, 0);
    }
    if (plan_.labels().form == Form::kOne) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) labels_[q] = one_label();
    }
  }

  __device__ Labels one_label() const {
    if constexpr (kAny) {
      return Labels::filled(plan_.labels().type, plan_.labels().data);
    } else {
      Labels quad;
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) quad.set(c, *static_cast<const Label*>(plan_.labels().data));
      return quad;
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
    logits_from_ = place<Logit>(plan_.logits().data, type(), element_);
    labels_from_ = place<Label>(plan_.labels().data, plan_.labels().type, element_);
    gradient_to_ =
        const_cast<decltype(gradient_to_)>(place<Logit>(plan_.gradient.data, type(), element_));
  }

  // Loads a turn, in the distance `at` from the thread's element.
  __device__ void fetch(uint32_t at, bool aligned) {
    if constexpr (kAnyLogit) {
      Logits::load(logits_, type(), plan_.width_of_logits,
                   logits_from_ + at * plan_.width_of_logits, aligned);
    } else {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q)
        logits_[q] = Logits::load(logits_from_ + at + 32 * q, aligned);
    }
    if (kModified && uses<Modifiers>(kWhere)) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) load_quad(plan_.modifier(kWhere), at + 32 * q, &where_[q]);
    }
    if (plan_.labels().form != Form::kEach) return;
    if constexpr (kAny) {
      const int width = plan_.width_of_labels;
      Labels::load(labels_, plan_.labels().type, width, labels_from_ + at * width, aligned);
    } else {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q)
        labels_[q] = Labels::load(labels_from_ + at + 32 * q, aligned);
    }
  }
  // Visits the logits of a turn: visit(quad, place in it, logit).
  template <class Visit>
  __device__ void each_logit(const Visit& visit) const {
    if constexpr (kAnyLogit) {
      Logits::each(logits_, type(), plan_.width_of_logits,
                   [&](int q, int c, Scalar x, auto) { visit(q, c, x); });
    } else {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          if constexpr (sizeof(Logit) == 2)
            visit(q, c, of_pair(c < 2 ? logits_[q].vectors[0].x : logits_[q].vectors[0].y, c % 2));
          else
            visit(q, c, convert(logits_[q].get(c)));
        }
      }
    }
  }
  // Visits the labels of a turn: visit(quad, place in it, label). Elements are masked by `where`
  // and by their labels, too; `kept` says which are not, and the label of others is 0.
  template <class Visit>
  __device__ void each_label(uint32_t* kept, const Visit& visit) const {
    if constexpr (kAny) {
      const Type type = plan_.labels().type;
      if (!uses_some<Modifiers>(kMasks)) {
        Labels::each(labels_, type, plan_.width_of_labels,
                     [&](int q, int c, Scalar y, auto) { visit(q, c, y); });
        return;
      }
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) kept[q] = kept_by_where(q);
      Labels::each(
          labels_, type, plan_.width_of_labels, [&](int q, int c, Scalar y, auto is_int32) {
            const bool same = decltype(is_int32)::value
                                  ? ((labels_[q].word(c) ^ ignored_) | nothing_ignored_) == 0
                                  : y == ignored_number_;
            if (same) kept[q] &= ~(0x80u << 8 * c);
            visit(q, c, is_kept(kept[q], c) ? y : 0);
          });
    } else {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          if constexpr (std::is_same_v<Label, uint8_t>)
            visit(q, c, label_of<Scalar>(plan_.labels().type, labels_[q].get(c)));
          else
            visit(q, c, convert(labels_[q].get(c)));
        }
      }
    }
  }

  // Of 16-bit logits: pairs of them to and from float32.
  __device__ Scalar of_pair(uint32_t pair, bool second) const {
    return type() == Type::kF16 ? convert_pair(__half(), pair, second)
                                : convert_pair(__nv_bfloat16(), pair, second);
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
  // soft, logits and labels as they are. Masked elements have a logit and a label of 0.
  template <bool kSoft>
  struct Turn {
    Scalar x[kQuads][kQuad];
    std::conditional_t<kNarrow && !kSoft, uint32_t[kQuads][2], Scalar[kQuads][kQuad]> labels;
    typename L::Bits soft = 0;  // 0 if all labels are 0 or 1
    uint32_t kept[kQuads];      // the first bit of a byte for each element, 0 if it is masked
    bool common = true;
  };

  // Evaluates common turns, of up to `size` elements of each thread. Returns where there is another
  // kind of turn.
  __device__ __forceinline__ int common_turns(int size, int octet) {
    if constexpr (kModified && sizeof(Logit) == 8) return 0;
    if (!usual_ || !plan_.dense || (kModified && !plan_.common_modifiers)) return 0;
    // A thread without elements evaluates those of the first octet once more, and keeps nothing.
    if (!there_) element_ -= octet * 256;
    int at = 0;
    if constexpr (kModified) {
      at = soft_ ? turns<true, true>(size) : turns<false, true>(size);
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
  template <bool kSoft, bool kDirect, bool kGradient = true>
  __device__ __forceinline__ int turns(int size) {
    point();
    fetch(0, kDirect || plan_.aligned);
    int at = 0;
#pragma unroll 1
    for (; at < size; at += kStep) {
      Turn<kSoft> turn;
      if constexpr (kSoft)
        read(&turn);
      else
        read_turned(&turn);
      const bool is_hard = turn.soft == 0;
      if (any_of_warp(!turn.common || !(is_hard || (kSoft && (kNarrow || smoothing_ == 0))))) {
        if (!kSoft) soft_ = any_of_warp(!is_hard);
        return at;
      }
      // Without a condition, as that would take copies of all registers: the last turn loads its
      // own quads again.
      fetch(at + kStep < size ? at + kStep : at, kDirect || plan_.aligned);
      Scalar sums[kQuad] = {};
      if constexpr (kModified) {
        evaluate_modified(at, turn);
      } else {
        BCE_UNROLL
        for (int q = 0; q < kQuads; ++q) {
          if constexpr (kSoft)
            evaluate_soft<kDirect>(at + 32 * q, turn.x[q], turn.labels[q]);
          else if constexpr (kNarrow)
            evaluate_narrow<kDirect, kGradient>(at + 32 * q, turn.x[q], turn.labels[q], sums);
          else
            evaluate_turned<kDirect, kGradient>(at + 32 * q, turn.x[q], turn.labels[q]);
        }
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
    each_label(turn->kept, [&](int q, int c, Scalar y) { turn->labels[q][c] = y; });
    each_logit([&](int q, int c, Scalar x) { turn->x[q][c] = x; });
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      mask<Modifiers>(turn->x[q], turn->kept[q]);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Scalar x = turn->x[q][c], y = turn->labels[q][c];
        turn->common &= is_common(x) && L::magnitude(y) <= 1;
        if (kNarrow) turn->common &= y >= 0;
        turn->soft |= L::to_bits(L::fma(y, y, -y));
      }
    }
  }

  __device__ void read_turned(Turn<false>* turn) const {
    if constexpr (kNarrow) {
      read_signs(turn);
    } else {
      read_turns(turn);
      each_logit(
          [&](int q, int c, Scalar x) { turn->x[q][c] = in_register(x * turn->labels[q][c]); });
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        mask<Modifiers>(turn->x[q], turn->kept[q]);
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) turn->common &= is_common(turn->x[q][c]);
      }
    }
  }

  __device__ void read_signs(Turn<false>* turn) const {
    Scalar y[kQuads][kQuad];
    if constexpr (kAny)
      each_label(turn->kept, [&](int q, int c, Scalar label) { y[q][c] = label; });
    uint32_t largest = 0;
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      auto* labels = turn->labels[q];
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
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          turn->soft |= L::to_bits(L::fma(y[q][c], y[q][c], -y[q][c]));
          if (y[q][c] == 1) labels[c / 2] |= c % 2 ? 0x80000000 : 0x8000;
        }
      }
      const auto& words = logits_[q].vectors[0];
      const uint32_t pairs[] = {in_register(words.x ^ labels[0]), in_register(words.y ^ labels[1])};
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) turn->x[q][c] = of_pair(pairs[c / 2], c % 2);
      largest = with_pair(with_pair(largest, words.x), words.y);
    }
    constexpr Scalar kCommon = Format<Scalar>::kCommon;
    turn->common = all_within(
        largest, type() == Type::kF16 ? bits_of<__half>(kCommon) : bits_of<__nv_bfloat16>(kCommon));
  }

  __device__ void read_turns(Turn<false>* turn) const {
    if constexpr (std::is_same_v<Label, uint8_t>) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q) turn_by_bytes(labels_[q].vectors[0], q, turn);
      return;
    } else if constexpr (kAny && kWidths & 1) {
      if (plan_.width_of_labels == 1) {
        BCE_UNROLL
        for (int q = 0; q < kQuads; ++q) {
          uint32_t word = labels_[q].word(0);
          if (uses_some<Modifiers>(kMasks)) {
            turn->kept[q] = kept_by_where(q);
            if (uses<Modifiers>(kIgnoreLabel))
              turn->kept[q] &= nonzero_bytes(word ^ ignored_ * 0x1010101);
            word &= (turn->kept[q] >> 7) * 0xff;
          }
          turn_by_bytes(word, q, turn);
        }
        return;
      }
    }
    each_label(turn->kept, [&](int q, int c, Scalar y) {
      turn->labels[q][c] = in_register(turn_of<L>(y));
      turn->soft |= L::to_bits(L::fma(y, y, -y));
    });
  }
  __device__ void turn_by_bytes(uint32_t word, int q, Turn<false>* turn) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c)
      turn->labels[q][c] = L::from_bits(L::to_bits(1) | typename L::Bits{word >> 8 * c & 1}
                                                            << (8 * sizeof(Scalar) - 1));
    turn->soft |= word & 0xfefefefe;
  }

  // Whether there is one of those modifiers.
  template <class Uses>
  __device__ bool uses_some(uint32_t names) const {
    if constexpr (Uses::kExact)
      return Uses::kNames & names;
    else
      return plan_.uses & names;
  }
  template <class Uses>
  __device__ bool uses(ModifierName name) const {
    return uses_some<Uses>(1u << name);
  }
  __device__ uint32_t kept_by_where(int q) const {
    return uses<Modifiers>(kWhere) ? nonzero_bytes(where_[q]) : 0x80808080;
  }
  __device__ static bool is_kept(uint32_t kept, int c) { return kept & 0x80u << 8 * c; }

  // Sets numbers of masked elements to 0.
  template <class Uses>
  __device__ void mask(Scalar* numbers, uint32_t kept) const {
    if (!uses_some<Uses>(kMasks)) return;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) numbers[c] = is_kept(kept, c) ? numbers[c] : 0;
  }
  // Adds up the losses of a quad, or puts them into the tile, or else, unless kReduce, calls
  // `store`.
  template <bool kReduce = false, class Store>
  __device__ void keep(int at, Pair<Scalar>* losses, const Store& store) {
    if (plan_.losses == Losses::kSum) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        high_[c] += losses[c].high;
        low_[c] += losses[c].low;
      }
    } else if (kReduce || plan_.losses == Losses::kTile) {
      BCE_UNROLL
      for (int c = 0; c < kQuad && kModified; ++c) losses[c] = finite_low<L>(losses[c]);
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

  template <bool kDirect, bool kGradient, bool kCommon = true>
  __device__ void evaluate_turned(int at, const Scalar* z, const Scalar* turns) {
    Exponential<L> exponential[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) exponential[c] = exp_of<L, kCommon>(z[c]);
    Pair<Scalar> losses[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) losses[c] = turned_loss_of<L, kCommon>(z[c], exponential[c]);
    keep(at, losses, [&] {
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] = rest_ * rounded_once(losses[c], type());
      put<kDirect>(plan_.loss, at, rounded(values));
    });
    if (kGradient && (kDirect || with_gradient())) {
      Scalar values[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Pair<Scalar> gradient = turned_gradient_of<L, kCommon>(z[c], exponential[c]);
        values[c] = rest_ * turns[c] * rounded_once(gradient, type());
      }
      put<kDirect>(plan_.gradient, at, rounded(values));
    }
  }

  // A turn with modifiers. Which there are is decided once for the turn, if they are usual.
  template <bool kSoft>
  __device__ void evaluate_modified(int at, const Turn<kSoft>& turn) {
    const auto with = [&](auto uses) {
      BCE_UNROLL
      for (int q = 0; q < kQuads; ++q)
        evaluate_modified<kSoft, decltype(uses)>(at + 32 * q, turn.x[q], turn.labels[q],
                                                 turn.kept[q]);
    };
    const uint32_t usual = plan_.usual_modifiers;
    if (usual == kOneWeight) return with(Exactly<kOneWeight>());
    if constexpr (!kSoft) {
      if (usual & kOneWeight) return with(Exactly<kWeights>());
      if (usual) return with(Exactly<1u << kPosWeight>());
    }
    with(AnyModifiers());
  }

  // A quad of it: turned logits and their turns, or, if kSoft, logits and labels.
  template <bool kSoft, class Uses>
  __device__ void evaluate_modified(int at, const Scalar* x, const Scalar* labels, uint32_t kept) {
    Pair<Scalar> weight[kQuad];
    Scalar pos_weight[kQuad];
    if (uses_some<Uses>(kWeights)) load_weights<kSoft, Uses>(at, labels, weight, pos_weight);
    const bool positive = kSoft && uses<Uses>(kPosWeight);
    Exponential<L> exponential[kQuad];
    Pair<Scalar> losses[kQuad];
    Pair<Scalar> coefficients[kQuad], factors[kQuad];
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) exponential[c] = exp_of<L, true>(x[c]);
    if constexpr (kSoft) {
      if (positive) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          const auto both = coefficients_of<L>(x[c], labels[c], smoothing_, pos_weight[c]);
          coefficients[c] = both.c, factors[c] = both.t;
        }
      } else {
        common_coefficients_of(x, labels, coefficients);
      }
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) losses[c] = log1p_of<L>(exponential[c]);
      if (positive) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          losses[c] = loss_from<L>(x[c], coefficients[c], product_of<L>(losses[c], factors[c]), 1);
          // 0 times an infinite loss is 0 here.
          if (weight[c].high == 0 && L::magnitude(losses[c].high) == Format<Scalar>::kInfinity)
            losses[c].high = 0;
        }
      } else {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c)
          losses[c] = loss_from<L, true>(x[c], coefficients[c], losses[c], 1);
      }
    } else {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) losses[c] = turned_loss_of<L>(x[c], exponential[c]);
    }
    constexpr bool kUsual = Uses::kExact;
    const Type stored = kUsual ? Type::kF32 : type();
    const auto put_scaled = [&](const Result& result, Scalar* values) {
      if (uses_some<Uses>(kWeights)) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) values[c] *= weight[c].high;
      }
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] *= rest_;
      mask<Uses>(values, kept);  // a NaN or negative factor would show
      put_as_logits(result, at, stored, values);
    };
    Scalar values[kQuad];
    if (!kUsual && plan_.losses == Losses::kStore) {
      if (with_loss()) {
        round_once(losses, stored, values);
        put_scaled(plan_.loss, values);
      }
    } else {
      if (uses_some<Uses>(kWeights)) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          losses[c] = Uses::kPairs ? product_of<L>(losses[c], weight[c])
                                   : product_of<L>(losses[c], weight[c].high);
        }
      }
      if (uses_some<Uses>(kMasks)) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c)
          if (!is_kept(kept, c)) losses[c] = {0, 0};
      }
      keep<kUsual>(at, losses, [] {});
    }
    if (!kUsual && !with_gradient()) return;
    Pair<Scalar> gradients[kQuad];
    if constexpr (kSoft) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) gradients[c] = sigmoid_of<L>(exponential[c]);
      if (positive) {
        BCE_UNROLL
        for (int c = 0; c < kQuad; ++c) gradients[c] = product_of<L>(gradients[c], factors[c]);
      }
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c)
        gradients[c] = gradient_from<L>(x[c], coefficients[c], gradients[c], 1);
    } else {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) gradients[c] = turned_gradient_of<L>(x[c], exponential[c]);
    }
    round_once(gradients, stored, values);
    if constexpr (!kSoft) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) values[c] *= labels[c];
    }
    put_scaled(plan_.gradient, values);
  }

  // The weights of a quad, with those of hard labels of 1; and, of soft labels, what remains of
  // these. They are loaded where they are needed: other warps evaluate meanwhile.
  template <bool kSoft, class Uses>
  __device__ void load_weights(int at, const Scalar* labels, Pair<Scalar>* weight,
                               Scalar* pos_weight) const {
    const auto load = [&](ModifierName name, Scalar* numbers) {
      load_quad<Uses>(plan_.modifier(name), at, numbers);
    };
    Scalar numbers[kQuad] = {1, 1, 1, 1};
    if (uses<Uses>(kWeight)) load(kWeight, numbers);
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) weight[c] = {numbers[c], 0};
    if (uses<Uses>(kSampleWeight)) {
      load(kSampleWeight, numbers);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Scalar product = weight[c].high * numbers[c];
        weight[c] = {product, L::fma(weight[c].high, numbers[c], -product)};
      }
    }
    if (uses<Uses>(kPosWeight)) {
      load(kPosWeight, numbers);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        if constexpr (kSoft) {
          const auto own = weight_of<L>(weight[c], numbers[c], labels[c], smoothing_);
          weight[c] = own.weight;
          pos_weight[c] = own.pos_weight;
        } else {
          const Scalar own = labels[c] < 0 ? numbers[c] : 1;
          weight[c] = Uses::kPairs ? product_of<L>(weight[c], own) : Pair<Scalar>{own, 0};
        }
      }
    }
  }

  // A modifier's numbers, from the element in the distance `at`, or its column or row.
  template <class Uses>
  __device__ void load_quad(const Input& input, int at, Scalar* numbers) const {
    uint4 words;
    load_words<float, Uses>(input, at, &words);
    numbers[0] = __uint_as_float(words.x), numbers[1] = __uint_as_float(words.y);
    numbers[2] = __uint_as_float(words.z), numbers[3] = __uint_as_float(words.w);
  }
  __device__ void load_quad(const Input& input, int at, uint32_t* bytes) const {
    load_words<uint8_t, Modifiers>(input, at, bytes);
  }
  template <class Number, class Uses, class Words>
  __device__ void load_words(const Input& input, int at, Words* words) const {
    const Number* data = static_cast<const Number*>(input.data);
    const bool whole = Uses::kExact || plan_.whole_quads;
    const bool by_row = Uses::kExact && Uses::kPairs && &input == &plan_.modifier(kSampleWeight);
    const Form form = by_row ? Form::kByRow : input.form;
    const uint32_t column = column_ + at, row = row_of(column);
    if (whole && form == Form::kByColumn) {
      *words = __ldg(reinterpret_cast<const Words*>(data + (column - row * plan_.inner)));
      return;
    }
    if (whole && form == Form::kEach) {
      *words = __ldg(reinterpret_cast<const Words*>(data + element_ + at));
      return;
    }
    Number numbers[kQuad];
    if (whole || form == Form::kOne) {
      // Common modifiers have fewer than 2^31 rows.
      const uint32_t place = form == Form::kOne ? 0 : static_cast<uint32_t>(row_) + row;
      const Number number = __ldg(data + place);
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) numbers[c] = number;
    } else {
#pragma unroll 1
      for (int c = 0; c < kQuad; ++c) {
        BCE_UNROLL
        for (int next = 1; next < kQuad; ++next) numbers[next - 1] = numbers[next];
        const uint32_t row = row_of(column + c);
        numbers[kQuad - 1] =
            __ldg(data + (form == Form::kEach       ? element_ + at + c
                          : form == Form::kByColumn ? column + c - row * plan_.inner
                                                    : row_ + row));
      }
    }
    memcpy(words, numbers, sizeof numbers);
  }
  __device__ uint32_t row_of(uint32_t column) const {
    return __umulhi(column, plan_.magic) >> plan_.shift;
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
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) losses[c] = {narrow_element(x[c], y[c], &gradients[c]), 0};
    } else {
      Exponential<L> exponential[kQuad];
      Pair<Scalar> coefficients[kQuad];
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) exponential[c] = exp_of<L, true>(x[c]);
      common_coefficients_of(x, y, coefficients);
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
  // Of a quad. In a common turn, labels that are smoothed are 0 or 1.
  __device__ void common_coefficients_of(const Scalar* x, const Scalar* y,
                                         Pair<Scalar>* coefficients) const {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) coefficients[c] = coefficient_of<L>(x[c], y[c]);
    if (smoothing_ == 0) return;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c)
      coefficients[c] = coefficients[c].high == 0 ? smoothed_[0] : smoothed_[1];
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
  __device__ void put_as_logits(const Result& result, int at, Type stored,
                                const Scalar* values) const {
    if (stored == Type::kF32) {
      put<true>(result, at, Quad<float>::rounded(values));
    } else {
      Quad<uint16_t> quad;
      quad.vectors[0] = {to_pair(values[0], values[1]), to_pair(values[2], values[3])};
      put<true>(result, at, quad);
    }
  }

  // A turn of hard labels and any logits, unless there is an infinite loss or NaN.
  __device__ bool hard_turn() {
    const bool usual = usual_ && plan_.direct && with_gradient() && smoothing_ == 0;
    if (!usual || any_of_warp(left_ < kStep - 32 + kQuad)) return false;
    point();
    fetch(0, true);
    Turn<false> turn;
    read_turned(&turn);
    bool finite = turn.soft == 0;
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) finite &= turn.x[q][c] < Format<Scalar>::kInfinity;
    }
    if (any_of_warp(!finite)) return false;
    BCE_UNROLL
    for (int q = 0; q < kQuads; ++q)
      evaluate_turned<true, true, false>(32 * q, turn.x[q], turn.labels[q]);
    advance(kStep);
    return true;
  }

  // A turn of any elements, one at a time, in the order in which lanes add them up.
  __device__ void any_turn() {
    if constexpr (kPads)
      if (hard_turn()) return;
#pragma unroll 1
    for (int i = 0; i < kQuads * kQuad; ++i) {
      const int at = i / kQuad * 32 + i % kQuad;
      Pair<Scalar> loss = {0, 0};
      if (at < left_) {
        loss = any_element(at);
        if (plan_.losses == Losses::kTile) tile<Scalar>()[spread(place_ + at)] = loss;
      }
      const double high = high_[0] + loss.high;
      const Scalar low = low_[0] + loss.low;
      BCE_UNROLL
      for (int next = 1; next < kQuad; ++next)
        high_[next - 1] = high_[next], low_[next - 1] = low_[next];
      high_[kQuad - 1] = high, low_[kQuad - 1] = low;
    }
    advance(kStep);
  }

  // Stores an element's results, and returns its loss, to be added up with its power.
  __device__ Pair<Scalar> any_element(int at) {
    const int64_t element = element_ + at;
    Pair<Scalar> loss;
    Scalar gradient = 0;
    if constexpr (kModified) {
      loss = modified_element(at, &gradient);
    } else {
      const Scalar x = number_at<Scalar>(plan_.logits().data, type(), element);
      const Scalar y = number_at<Scalar>(plan_.labels().data, type_of_labels(),
                                         plan_.labels().form == Form::kOne ? 0 : element);
      // Each element is evaluated as its own value asks, so that its bits do not depend on its
      // neighbors.
      if (kNarrow && usual_ && is_narrow(L::magnitude(x)) && y >= 0 && y <= 1) {
        loss = {narrow_element(x, y, &gradient), 0};
      } else {
        const Exponential<L> exponential = exp_of<L>(x);
        loss = loss_of<L>(x, y, smoothing_, exponential);
        loss = plan_.reduce ? Pair<Scalar>{loss.high * power_, loss.low * power_}
                            : Pair<Scalar>{scaled(loss, plan_.loss.type), 0};
        gradient = scaled(gradient_of<L>(x, y, smoothing_, exponential), plan_.gradient.type);
      }
    }
    if (with_loss() && !plan_.reduce) store(plan_.loss, element, loss.high);
    if (with_gradient()) store(plan_.gradient, element, gradient);
    return loss;
  }

  __device__ Scalar scaled(Pair<Scalar> value, Type type) const {
    return rounded_once(value, type) * power_ * rest_;
  }

  static constexpr int kDigits = std::is_same_v<Logit, __nv_bfloat16> ? 8 : 11;  // or fewer

  // Of 16-bit logits. For labels of 0 and 1, gives the same bits as evaluate_narrow.
  __device__ Scalar narrow_element(Scalar x, Scalar y, Scalar* gradient) const {
    const Narrow<L> narrow = narrow_of<L, kDigits>(x);
    const Scalar coefficient = soft_coefficient_of(x, y, smoothing_);
    *gradient = soft_gradient_of<L>(x, coefficient, narrow.e, divisor_);
    const Scalar loss = L::fma(2, narrow.half_log1p, coefficient * L::magnitude(x));
    return plan_.reduce ? loss : loss * rest_;
  }

  // Where an element's number is.
  struct Place {
    int64_t element, row;
    uint32_t column;
  };
  __device__ static int64_t index_of(const Input& input, const Place& place) {
    switch (input.form) {
      case Form::kByColumn:
        return place.column;
      case Form::kByRow:
        return place.row;
      default:
        return input.at(place.element);
    }
  }

  // The numbers of some inputs, which follow each other in memory, or 1 where there is none. In a
  // loop, as each takes much code.
  template <int kCount>
  __device__ static void gather(const Input* inputs, const Place& place, Scalar* numbers) {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      BCE_UNROLL
      for (int next = 1; next < kCount; ++next) numbers[next - 1] = numbers[next];
      const Input& input = inputs[i];
      numbers[kCount - 1] =
          input.data ? number_at<Scalar>(input.data, input.type, index_of(input, place)) : 1;
    }
  }

  __device__ Pair<Scalar> modified_element(int at, Scalar* gradient) {
    Place place = {element_ + at, 0, 0};
    if (plan_.inner) {
      const uint32_t column = column_ + at, rows = row_of(column);
      place.row = row_ + rows;
      place.column = column - rows * plan_.inner;
    }
    const FactorOfElement factor = factor_of(place.element);
    if (factor.is_zero || is_masked(place)) return {0, 0};

    enum { kX, kY, kS, kW, kOfSample, kQ, kNumbers };  // as in Plan
    Scalar numbers[kNumbers] = {};
    gather<kNumbers>(plan_.inputs, place, numbers);
    const Scalar x = numbers[kX], y = numbers[kY], smoothing = numbers[kS];
    Pair<Scalar> weight = {numbers[kW], 0};
    if (given(kSampleWeight)) weight = product_of<L>(weight, numbers[kOfSample]);
    weight = {weight.high * factor.power, weight.low * factor.power};
    if (plan_.total) return finite_low<L>(weight);

    Pair<Scalar> loss;
    if (plan_.focal) {
      loss = focal_element(x, y, smoothing, place, gradient, &weight);
    } else {
      const auto own = weight_of<L>(weight, numbers[kQ], y, smoothing);
      weight = own.weight;
      const Exponential<L> exponential = exp_of<L>(x);
      loss = loss_of<L, false, true>(x, y, smoothing, exponential, own.pos_weight);
      *gradient =
          rounded_once(gradient_of<L, false, true>(x, y, smoothing, exponential, own.pos_weight),
                       plan_.gradient.type);
    }
    const auto scaled = [&](Scalar value) {
      return weighted<L>(Pair<Scalar>{value, 0}, weight.high).high * factor.rest;
    };
    *gradient = scaled(*gradient);
    if (plan_.reduce) return weighted<L>(loss, weight);
    return {scaled(rounded_once(loss, plan_.loss.type)), 0};
  }

  struct FactorOfElement {
    Scalar rest, power;
    bool is_zero;
  };
  __device__ FactorOfElement factor_of(int64_t element) const {
    if (plan_.factors != Factors::kAny) return {rest_, power_, false};
    const Factor<Scalar> factor = plan_.factor_at<Scalar>(element);
    return {factor.rest, static_cast<Scalar>(factor.power), factor.is_zero()};
  }

  __device__ bool is_masked(const Place& place) const {
    const Input &labels = plan_.labels(), &where = plan_.modifier(kWhere),
                &ignored = plan_.modifier(kIgnoreLabel);
    return (where.data && number_at<Scalar>(where.data, where.type, index_of(where, place)) == 0) ||
           (ignored.data && same_number(labels.type, labels.data, index_of(labels, place),
                                        ignored.data, ignored.at(place.element)));
  }

  // The loss and the gradient of an element; *weight gets its factor alpha.
  __device__ Pair<Scalar> focal_element(Scalar x, Scalar y, Scalar smoothing, const Place& place,
                                        Scalar* gradient, Pair<Scalar>* weight) {
    enum { kOfAlpha, kOfGamma, kOfGammaPos, kOfClip, kNumbers };  // as in ModifierName
    Scalar numbers[kNumbers] = {};
    gather<kNumbers>(&plan_.modifier(kAlpha), place, numbers);
    const Scalar gamma = numbers[kOfGamma], gamma_pos = numbers[kOfGammaPos];
    if (given(kAlpha))
      *weight = product_of<L>(*weight, balance_of<L>(numbers[kOfAlpha], y, smoothing));
    const FocalResult<Scalar> result = focal_of(
        x, y, smoothing, focus_of(gamma, given(kGammaPos) ? gamma_pos : gamma, numbers[kOfClip]));
    *gradient = result.gradient;
    return result.loss;
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
  int64_t row_ = 0;
  uint32_t column_ = 0;
  // The ignored label as it is stored, if it is an integer, and as a number.
  uint32_t ignored_;
  Scalar ignored_number_ = Format<Scalar>::kInfinity - Format<Scalar>::kInfinity;
  uint32_t nothing_ignored_ = 1;
  uint32_t where_[kQuads];
  // Of a focal loss: the last clip, and its logit.
  Scalar clip_ = 0;
  Pair<Scalar> clip_logit_ = {-0x1p100, 0};
  double high_[kQuad];
  Scalar low_[kQuad];
};

}  // namespace
}  // namespace jax_bce
