// The CUDA kernel against the CPU kernel, every result, for all dtypes, and for sizes and addresses
// around those of every loop. Compiled by nvcc it runs on a GPU; with on_host/ before CUDA's own
// headers, by the host's compiler, it runs the same source without one.
//
//     test EFFORT     -1: a few calls, 0: of every kind, 1: of more sizes, 2: of all
#include <string>

#include "call.h"

namespace {

using namespace jax_bce;

// All that may differ from the CPU kernel. Of float32 logits on the host, nothing. A GPU divides
// float32 numbers with an error of an ulp in a few of 2^27 (bce_cuda_numbers.cuh), and that reaches
// a loss at times. 16-bit logits have a shorter arithmetic there (narrow_of); `exact` has the
// bounds.
constexpr bool kOnGpu = CUDART_VERSION > 0;

struct Comparison {
  const char* what;
  int64_t allowed_ulps;  // at most so far
  int64_t among;         // and no more often than once in so many results, or once
  int64_t results = 0, different = 0;

  bool holds() const { return (different - 1) * among <= results; }
};
Comparison losses{"losses of float32 logits", kOnGpu ? 1 : 0, 1'000'000};
Comparison others{"gradients of float32 logits, and results of float64 ones", 0, 1};
Comparison narrow{"16-bit results", 2, 1'000};
Comparison narrow_sums{"summed losses of 16-bit logits", 8, 1};
Comparison wide{"32-bit results of 16-bit logits", 8, 1};
Comparison focal{"results of focal losses", kOnGpu ? 2 : 0, 1'000};

constexpr Type kTypes[] = {Type::kF16, Type::kBF16, Type::kF32, Type::kF64, Type::kBool,
                           Type::kI8,  Type::kU8,   Type::kI16, Type::kI32, Type::kI64};
constexpr const char* kNames[] = {"f16", "bf16", "f32", "f64", "bool",
                                  "i8",  "u8",   "i16", "i32", "i64"};
const char* name(Type type) { return kNames[static_cast<int>(type)]; }

// The bits of a floating-point number in the order of the numbers, in which neighbours differ by 1.
int64_t place(Type type, const char* element, bool* is_nan) {
  uint64_t bits = 0;
  std::memcpy(&bits, element, width(type));
  const uint64_t sign = uint64_t{1} << (8 * width(type) - 1);
  const uint64_t infinity = type == Type::kF16    ? 0x7c00
                            : type == Type::kBF16 ? 0x7f80
                            : type == Type::kF32  ? 0x7f800000
                                                  : 0x7ff0000000000000;
  const int64_t magnitude = static_cast<int64_t>(bits & ~sign);
  *is_nan = static_cast<uint64_t>(magnitude) > infinity;
  return bits & sign ? -1 - magnitude : magnitude;
}

// What is not a number equals its like.
int64_t ulps_apart(Type type, const char* a, const char* b) {
  bool a_is_nan, b_is_nan;
  const int64_t first = place(type, a, &a_is_nan), second = place(type, b, &b_is_nan);
  if (a_is_nan || b_is_nan) return a_is_nan && b_is_nan ? 0 : INT64_MAX;
  const uint64_t distance = static_cast<uint64_t>(std::max(first, second)) -
                            static_cast<uint64_t>(std::min(first, second));
  return static_cast<int64_t>(std::min<uint64_t>(distance, INT64_MAX));
}

template <class To>
To cast(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

// Counts the results that are too far, and keeps the index of the first. Sums in float64 of a
// narrower arithmetic are compared as float32. A float32 result may also be off by `slack`.
template <class Slack>
int64_t too_far(Comparison* comparison, Type type, Type arithmetic, const Array& result,
                int64_t* first, const Slack& slack) {
  const std::vector<char> found = result.download();
  int64_t count = 0;
  for (size_t at = 0; at < found.size(); at += width(type)) {
    const char *expected = result.host() + at, *actual = found.data() + at;
    float rounded[2];
    if (type == Type::kF64 && arithmetic == Type::kF32) {
      rounded[0] = static_cast<float>(cast<double>(expected));
      rounded[1] = static_cast<float>(cast<double>(actual));
      expected = reinterpret_cast<const char*>(&rounded[0]);
      actual = reinterpret_cast<const char*>(&rounded[1]);
    }
    const int64_t ulps = ulps_apart(std::min(type, arithmetic), expected, actual);
    ++comparison->results;
    comparison->different += ulps > 0;
    if (ulps <= comparison->allowed_ulps) continue;
    const double off = slack(at / width(type));  // 0 is not -0
    if (std::min(type, arithmetic) == Type::kF32 && off > 0 &&
        std::fabs(cast<float>(expected) - cast<float>(actual)) <= off)
      continue;
    if (count++ == 0) *first = at / width(type);
  }
  return count;
}

// What a call's losses would be if all weights were positive.
std::vector<double> with_positive_weights(const Call& call) {
  Problem problem = call.problem(&Array::host);
  std::vector<std::vector<char>> positive(kWhere);
  for (int name = 0; name < kWhere; ++name) {
    if (!problem.modifiers[name].data) continue;
    const Type type = call.modifier_type(name);
    std::vector<char>& bytes = positive[name] = call.modifiers[name].copy();
    for (size_t at = 0; at < bytes.size(); at += width(type)) {
      if (is_float(type)) {
        bytes[at + width(type) - 1] &= 0x7f;
      } else if (type == Type::kI32) {
        const int32_t number = std::abs(std::max(cast<int32_t>(&bytes[at]), -INT32_MAX));
        std::memcpy(&bytes[at], &number, sizeof number);
      }
    }
    problem.modifiers[name].data = bytes.data();
  }
  std::vector<char> losses(call.losses * width(call.loss_type));
  problem.loss.data = losses.data();
  problem.gradient.data = nullptr;
  bce_cpu(problem);
  std::vector<double> found;
  for (int64_t i = 0; i < call.losses; ++i)
    found.push_back(call.loss_type == Type::kF64 ? cast<double>(&losses[8 * i])
                                                 : double{cast<float>(&losses[4 * i])});
  return found;
}

bool check(const Case& c, cudaStream_t stream) {
  const Call call(c);
  bce_cpu(call.problem(&Array::host));
  call.enqueue(stream);
  must(cudaStreamSynchronize(stream));
  int64_t first = -1;
  const bool is_narrow = width(c.logits) == 2;
  Comparison* of_losses = c.logits == Type::kF32      ? &losses
                          : !is_narrow                ? &others
                          : c.reduce                  ? &narrow_sums
                          : width(call.loss_type) > 2 ? &wide
                                                      : &narrow;
  Comparison* of_gradients = !is_narrow ? &others : width(call.gradient_type) > 2 ? &wide : &narrow;
  if (c.modifiers >> kGamma & 1 && !c.total) of_losses = of_gradients = &focal;
  const Type arithmetic = call.arithmetic;
  // The terms of a gradient of 16-bit logits may cancel: 2^-21 of the larger one, which is below
  // the factor for labels from 0 to 1.
  const auto cancelled = [&](int64_t i) {
    if (!is_narrow || c.modifiers) return 0.0;
    const Problem problem = call.problem(&Array::host);
    const Factor<float> factor =
        problem.factor_at<float>(problem.row_start(i / c.columns), i % c.columns);
    return std::fabs(double{factor.rest} * factor.power) * 0x1p-21;
  };
  // So may the elements of a sum, if weights are negative: 2^-21 of the elements' magnitudes.
  std::vector<double> magnitudes;
  if (is_narrow && c.reduce && c.loss && c.modifiers & ((1 << kWhere) - 1))
    magnitudes = with_positive_weights(call);
  const auto of_sums = [&](int64_t i) {
    return magnitudes.empty() ? 0.0 : std::fabs(magnitudes[i]) * 0x1p-21;
  };
  const int64_t count =
      too_far(of_losses, call.loss_type, arithmetic, call.loss, &first, of_sums) +
      too_far(of_gradients, call.gradient_type, arithmetic, call.gradient, &first, cancelled);
  if (count)
    std::printf(
        "%lld differ, the first at %lld: logits %s, labels %s, %lld x %lld, offset %d, "
        "reduce %d, loss %d, gradient %d, one_label %d, scales %d, wide %d, smooth %d, modifiers "
        "%d "
        "of form %d, divisors %d, total %d\n",
        static_cast<long long>(count), static_cast<long long>(first), name(c.logits),
        name(c.labels), static_cast<long long>(c.rows), static_cast<long long>(c.columns), c.offset,
        c.reduce, c.loss, c.gradient, c.one_label, c.scales, c.wide, c.smooth, c.modifiers, c.form,
        c.divisors, c.total);
  return !count;
}

// An element has the same bits wherever it lies: what is aligned is evaluated by another loop.
bool same_anywhere(Case c, cudaStream_t stream) {
  std::vector<std::vector<char>> found;
  for (c.offset = 0; c.offset < 2; ++c.offset) {
    Call call(c);
    // Nothing but its address keeps an element from the first loop.
    random_bits.seed(c.columns);
    for (int64_t i = 0; i < call.size; ++i) {
      call.logits.set(i, std::normal_distribution<double>(0, 5)(random_bits));
      call.labels.set(i, random_bits() % 2);
    }
    for (const Array* operand : {&call.logits, &call.labels}) operand->upload();
    call.enqueue(stream);
    must(cudaStreamSynchronize(stream));
    found.push_back(call.loss.download());
    found.push_back(call.gradient.download());
  }
  const bool same = found[0] == found[2] && found[1] == found[3];
  if (!same)
    std::printf("%s, %s, %lld columns, reduce %d: other bits at another address\n", name(c.logits),
                name(c.labels), static_cast<long long>(c.columns), c.reduce);
  return same;
}

void approximate_by([[maybe_unused]] int off) {
#if CUDART_VERSION == 0
  exp2_ulps = 2 * off, reciprocal_ulps = off;  // both make a loss larger, or smaller
#endif
}

double number(Type type, uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  return type == Type::kF16 ? double{cast<_Float16>(&half)} : double{cast<float>(&bits)};
}

double number(Type type, const std::vector<char>& results, int64_t i) {
  return type == Type::kF32 ? cast<float>(&results[4 * i])
                            : number(type, cast<uint16_t>(&results[2 * i]));
}

// Of a 16-bit type.
double ulp(Type type, long double value) {
  const int digits = type == Type::kF16 ? 11 : 8, least = type == Type::kF16 ? -14 : -126;
  const int exponent = value == 0 ? least : std::max(std::ilogb(value), least);
  return std::ldexp(1.0, exponent - digits + 1);
}

std::vector<double> finite_logits(Type type, int step) {
  std::vector<double> logits;
  for (int bits = 0; bits < 65536; bits += step) {
    const double x = number(type, static_cast<uint16_t>(bits));
    if (std::isfinite(x)) logits.push_back(x);
  }
  return logits;
}

// Every finite logit of a 16-bit type: element by element, within 0.502 ulp (of the larger of the
// gradient's terms). And one in `step`, as the mean of 1024 like it, within a relative 2^-21.
bool exact(Type type, double label, double smoothing, int step, cudaStream_t stream) {
  double worst_loss = 0, worst_gradient = 0, worst_mean = 0;
  const auto of = [&](bool mean) {
    const std::vector<double> logits = finite_logits(type, mean ? step : 1);
    const int64_t size = logits.size();
    const int64_t columns = mean ? 1024 : size, rows = mean ? size : 1;
    Call call({type, Type::kF32, rows, columns, 0, mean, true, true, false, false, false,
               smoothing != 0});
    for (int64_t i = 0; i < call.size; ++i) {
      call.logits.set(i, logits[mean ? i / columns : i]);
      call.labels.set(i, label);
    }
    for (int64_t i = 0; i < call.smoothings_size; ++i) call.smoothing.set(i, smoothing);
    for (const Array* operand : {&call.logits, &call.labels, &call.smoothing}) operand->upload();
    Problem problem = call.problem(&Array::device);
    problem.smoothing.strides[0] = problem.smoothing.strides[1] = 0;
    call.enqueue(problem, stream);
    must(cudaStreamSynchronize(stream));
    const std::vector<char> loss = call.loss.download(), gradient = call.gradient.download();
    for (int64_t i = 0; i < size; ++i) {
      const long double x = logits[i], e = std::exp(-std::fabs(x)), s = smoothing;
      const long double y = (long double){static_cast<float>(label)} * (1 - s) + s / 2;
      const long double c = x >= 0 ? 1 - y : y;
      const long double exact_loss = std::log1p(e) + (c == 0 ? 0 : c * std::fabs(x));
      const long double off = number(call.loss_type, loss, i) - exact_loss;
      if (mean) {
        if (exact_loss > 1e-30)  // what is subnormal has fewer digits
          worst_mean = std::max<double>(worst_mean, std::fabs(off) / exact_loss);
        continue;
      }
      worst_loss = std::max<double>(worst_loss, std::fabs(off) / ulp(type, exact_loss));
      const long double larger = std::max(c, (1 - c) * e) / (1 + e);
      const long double exact_gradient = (x >= 0 ? 1 : -1) * (c - (1 - c) * e) / (1 + e);
      const long double gradient_off = number(type, gradient, i) - exact_gradient;
      worst_gradient =
          std::max<double>(worst_gradient, std::fabs(gradient_off) / ulp(type, larger));
    }
  };
  of(false);
  of(true);
  std::printf("%s, label %g, smoothing %g: loss %.5f ulp, gradient %.5f ulp, mean 2^%.2f\n",
              name(type), label, smoothing, worst_loss, worst_gradient, std::log2(worst_mean));
  return worst_loss <= 0.502 && worst_gradient <= 0.502 && worst_mean <= std::ldexp(1, -21);
}

}  // namespace

int main(int count, char** arguments) {
  const int effort = count > 1 ? std::atoi(arguments[1]) : 1;
  std::vector<int64_t> columns;
  const int step = effort == 2 ? 1 : effort == 1 ? 7 : 61;
  for (int64_t n = 0; n < 300; n += step) columns.push_back(n);
  for (int64_t edge : {512, 1024, 2048, 8192, 16384, 24576})
    for (int64_t n = edge - (effort > 0 ? 5 : 1); n <= edge + (effort > 0 ? 5 : 1); ++n)
      columns.push_back(n);

  cudaStream_t stream;
  must(cudaStreamCreate(&stream));
  int64_t cases = 0, failed = 0;
  const auto run = [&](const Case& c) { ++cases, failed += !check(c, stream); };
  // Every size, in the shapes of a loss that is trained with.
  for (int64_t n : columns) {
    const int offset = cases % 4;
    run({Type::kF32, Type::kF32, 1, n, offset, true, true, true, false, false, false, false});
    run({Type::kF32, Type::kU8, 3, n, offset, true, true, n % 2 == 0, false, n % 3 == 0, false,
         n % 5 == 0});
    run({Type::kBF16, Type::kU8, 2, n, offset, n % 2 == 0, true, true, false, false, false,
         n % 3 == 0});
    run({Type::kF32, Type::kF32, 1, n, offset, false, n % 2 == 0, true, false, true, false,
         n % 3 == 0});
  }
  // More tiles of rows than there are thread blocks on the host, so that one overwrites another.
  for (Type logits : {Type::kBF16, Type::kF32, Type::kF64})
    for (int64_t n : {30, 1000})
      run({logits, Type::kU8, 100'000 / n, n, 0, true, true, true, false, false, false, false});
  // Every pair of dtypes, in every kind of call; or, of a few, those with long and short rows.
  for (Type logits : {Type::kF16, Type::kBF16, Type::kF32, Type::kF64})
    for (Type labels : kTypes)
      for (int kind = 0; kind < 32; kind += effort < 0 && kind % 2 ? 15 : 1) {
        const bool reduce = kind & 1, wide = kind & 2, one_label = kind & 4, scales = kind & 8;
        const int64_t n = kind & 16 ? 1024 + 13 * (1 + cases % 5) : 1 + cases % 70;
        for (int results = 1; results < 4; ++results)
          if (effort > 0 || results == 3 || cases % 8 == 0)
            run({logits, labels, n > 1000 ? 2 : 19, n, static_cast<int>(cases % 4),
                 reduce && (results & 1), (results & 1) != 0, (results & 2) != 0, one_label, scales,
                 wide, cases % 3 == 0});
      }
  // One label for all.
  for (Type logits : {Type::kF16, Type::kBF16, Type::kF32, Type::kF64})
    for (Type labels : kTypes)
      for (bool reduce : {false, true})
        run({logits, labels, 1, 1040, 0, reduce, true, true, true, false, false, false});
  for (Type logits : {Type::kF16, Type::kBF16, Type::kF32})
    for (int64_t n : {37, 1040, 9000})
      for (bool reduce : {false, true})
        run({logits, Type::kU8, 3, n, 0, reduce, true, true, false, false, false, n == 37, true});
  // Every set of modifiers, of every form, over long, short and single rows.
  for (int modifiers = 1; modifiers < 1 << kModifiersOfAll; ++modifiers)
    for (int form = 0; form < 12; form += effort > 0 ? 1 : effort == 0 ? 5 : 11)
      for (int64_t n : {1 + cases % 70, 1024 + 7 * (cases % 9)}) {
        constexpr Type kLogits[] = {Type::kF32, Type::kBF16, Type::kF64, Type::kF16};
        run({kLogits[effort > 0 ? cases % 4 : form % 4], kTypes[cases % 10], n > 100 ? 3 : 23, n,
             static_cast<int>(cases % 4), cases % 3 != 0 && cases % 5 != 0, cases % 5 != 0,
             cases % 5 == 0 || cases % 7 != 0, cases % 11 == 0, cases % 13 == 0, cases % 2 == 0,
             cases % 3 == 1, false, modifiers, form, static_cast<int>(cases / 2 % 4)});
      }
  // Common elements only, in whole turns: hard and soft labels, with and without modifiers and
  // smoothing.
  for (int modifiers = 0; modifiers < 1 << kModifiersOfAll; ++modifiers)
    for (int form = 0; form < 4; ++form)
      for (Type labels : {Type::kF32, Type::kU8, Type::kI32, Type::kBF16, Type::kI8})
        for (int64_t n : {36, 1028, 2049, 1500}) {
          if (effort <= 0 && n != 1028 && cases % 4) {
            ++cases;
            continue;
          }
          const Type logits = cases % 3 == 0 ? Type::kF32 : cases % 3 == 1 ? labels : Type::kF16;
          const bool is_float = logits <= Type::kF32, reduce = cases % 5 != 0;
          Case c = {is_float ? logits : Type::kF32,
                    labels,
                    n > 100 ? 3 : 90,
                    n,
                    0,
                    reduce,
                    true,
                    cases % 7 != 0,
                    cases % 11 == 0,
                    false,
                    false,
                    false};
          c.modifiers = modifiers, c.form = form, c.common = true;
          c.huge = modifiers && cases / 2 % 8 == 4;
          c.softness = !modifiers ? form : cases / 2 % 8 < 4 ? cases / 2 % 4 : 0;
          run(c);
        }
  for (Type logits : {Type::kF32, Type::kBF16})
    for (Type labels : {Type::kF32, Type::kU8, Type::kI32})
      for (int64_t n : {36, 1028, 2049, 30'000})
        for (bool reduce : {false, true})
          for (bool gradient : {false, true}) {
            Case c = {logits, labels, n > 100 ? 3 : 90, n, 0, reduce, true, gradient, false, false,
                      false,  false};
            c.common = c.padded = true;
            run(c);
          }
  // Focal losses, with every choice of their own numbers and of other modifiers.
  for (Type logits : {Type::kF32, Type::kF64, Type::kBF16, Type::kF16})
    for (int modifiers = 0; modifiers < 1 << kModifiersOfLosses; ++modifiers) {
      if (!(modifiers >> kGamma & 1) || modifiers >> kPosWeight & 1) continue;
      for (int64_t n : {1 + cases % 70, 1000 + 7 * (cases % 9)}) {
        if (++cases % 23 && effort < 0) continue;
        Case c = {logits,
                  kTypes[cases % 10],
                  n > 100 ? 2 : 23,
                  n,
                  static_cast<int>(cases % 4),
                  cases % 3 != 0,
                  true,
                  cases % 7 != 0,
                  cases % 11 == 0,
                  cases % 13 == 0,
                  cases % 5 == 0,
                  cases % 4 == 0};
        c.modifiers = modifiers, c.form = cases % 12,
        c.divisors = cases % 5 ? 0 : 1 + cases / 5 % 3;
        c.common = cases % 2;
        --cases, run(c);
      }
    }
  // Without modifiers, which take another loop; and sums of weights.
  for (Type logits : {Type::kF16, Type::kBF16, Type::kF32, Type::kF64})
    for (int64_t n : {1, 7, 90, 130, 1040, 9000})
      for (int divisors = 1; divisors < 4; ++divisors)
        for (bool reduce : {false, true})
          run({logits, Type::kU8, n > 100 ? 3 : 40, n, static_cast<int>(cases % 2), reduce, true,
               true, false, cases % 3 == 0, false, cases % 5 == 0, false, 0, 0, divisors});
  for (Type arithmetic : {Type::kF32, Type::kF64})
    for (int modifiers = 0; modifiers < 1 << kModifiersOfAll; ++modifiers)
      for (int64_t n : {1 + cases % 70, 1024 + 7 * (cases % 9)})
        run({arithmetic, kTypes[cases % 10], n > 100 ? 3 : 23, n, static_cast<int>(cases % 4), true,
             true, false, cases % 11 == 0, false, true, false, false, modifiers,
             static_cast<int>(cases % 12), 0, true});
  for (Type logits : {Type::kF16, Type::kBF16, Type::kF32})
    for (Type labels : {Type::kU8, logits})
      for (int64_t n : {1000, 3001, 20'000})
        for (bool reduce : {false, true})
          ++cases, failed += !same_anywhere(
                       {logits, labels, 3, n, 0, reduce, true, true, false, false, false, false},
                       stream);
  for (Type type : {Type::kF16, Type::kBF16})
    for (double label : {0.0, 1.0, 0.1, 0.9})
      for (double smoothing : {0.0, 0.1}) {
        if (effort < 0) continue;
        // Not of a GPU, as far off as its approximations of 2^x and 1 / x may be.
        for (int off = kOnGpu ? 0 : -1; off <= (kOnGpu ? 0 : 1); ++off) {
          approximate_by(off);
          ++cases, failed += !exact(type, label, smoothing, effort > 0 ? 61 : 1021, stream);
        }
        approximate_by(0);
      }
  must(cudaStreamDestroy(stream));
  for (const Comparison& comparison : {losses, others, narrow, narrow_sums, wide, focal}) {
    std::printf("%lld %s, %lld differ\n", static_cast<long long>(comparison.results),
                comparison.what, static_cast<long long>(comparison.different));
    failed += !comparison.holds();
  }
  std::printf("%lld cases, %lld failed\n", static_cast<long long>(cases),
              static_cast<long long>(failed));
  return failed != 0;
}
