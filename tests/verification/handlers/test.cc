// The handlers, called without XLA, for AddressSanitizer, UndefinedBehaviorSanitizer,
// ThreadSanitizer, valgrind and a fuzzer; see call.h.
//
//     test sizes STRIDE        every size from 0 to three blocks, or one in so many
//     test modifiers TIMES     every set of modifiers, with every target
//     test random SEED TIMES   calls of any kind, of which some must be refused
//     test threads TIMES       callers that share pools of 0, 1 and 4 threads
//     test corpus FILE         calls that a fuzzer found, in hexadecimal, one a line
//
// With -DFUZZ, what libFuzzer calls instead.
#include <fstream>

#include "call.h"

namespace {

using namespace jax_bce;

struct Counts {
  int64_t calls = 0, refused = 0, compared = 0, wrong = 0;
  uint64_t digest = 0xcbf29ce484222325;  // of all results, one after the other
};

// Which NaN it is depends on the compiler.
void add(const Buffer& result, const std::vector<char>& bytes, Counts* counts) {
  for (int64_t i = 0; i < result.bytes(); ++i) {
    const int64_t element = i / result.width() * result.width();
    const bool is_nan = std::isnan(number(result.type, &bytes[element]));
    const unsigned char byte = is_nan ? 0xff : bytes[i];
    counts->digest = (counts->digest ^ byte) * 0x100000001b3;
  }
}

void count(const Drawn& call, const Outcome& outcome, Counts* counts) {
  ++counts->calls;
  counts->refused += !outcome.error.empty();
  counts->compared += outcome.error.empty() && call.tame && is_extended();
  for (size_t i = 0; outcome.error.empty() && i < outcome.results.size(); ++i)
    add(call.results[i], outcome.results[i], counts);
  if (outcome.wrong.empty()) return;
  print(call, outcome);
  ++counts->wrong;
}

Counts sizes(int64_t stride) {
  Pool pool(0);
  Counts counts;
  for (int64_t size = 0; size <= 3 * kBlock; size += stride)
    for (const bool rows : {false, true}) {
      Source source(2 * size + rows);
      const Shape shape = rows && size > 0 ? Shape{1 + 300 / size, size} : Shape{size};
      const Drawn call = draw(source, &shape);
      count(call, evaluate(call, pool), &counts);
    }
  return counts;
}

Counts modifiers(int times) {
  Pool pool(0);
  Counts counts;
  for (int64_t bits = 0; bits < 1 << kModifiersOfLosses; ++bits) {
    const bool focal = bits >> kGamma & 1;
    if (bits >> kModifiersOfAll && !focal) continue;
    // Of a focal loss, which has no pos_weight, every 16th set in the short form.
    if (focal && (times > 1 ? bits >> kPosWeight & 1 : bits % 16 != bits >> kGamma)) continue;
    for (const int64_t more : {0, 3, 4, 7}) {  // a divisor's parts, and the power as a constant
      if (more > 3 && !focal) continue;
      for (int target = 0; target < (focal ? 4 : kTargets); ++target)
        for (int time = 0; time < times; ++time) {
          Source source(((bits * 8 + more) * 5 + target) * 1000 + time);
          Drawn call;
          do call = draw(source, nullptr, bits | more << kModifiers);
          while (call.target != target);
          count(call, evaluate(call, pool), &counts);
        }
    }
  }
  return counts;
}

Counts random(uint64_t seed, int64_t times) {
  Pool pool(0);
  Counts counts;
  for (int64_t time = 0; time < times; ++time) {
    Source source((seed << 32) + time);
    const Drawn call = draw(source, nullptr, -1, true);
    count(call, evaluate(call, pool), &counts);
  }
  return counts;
}

// Several blocks, so that callers hand work to the pool; the bits are those of a single thread.
Counts threads(int times) {
  const Shape shape = {3, kBlock + 77};
  std::vector<Drawn> calls;
  std::vector<Outcome> expected;
  Pool none(0);
  for (int i = 0; i < 8; ++i) {
    Source source(i);
    calls.push_back(draw(source, &shape));
    expected.push_back(evaluate(calls[i], none));
  }
  Counts counts;
  std::mutex mutex;
  for (const int size : {0, 1, 4}) {
    Pool pool(size);
    std::vector<std::thread> callers;
    for (int i = 0; i < 8; ++i)
      callers.emplace_back([&, i] {
        for (int time = 0; time < times; ++time) {
          Outcome outcome = evaluate(calls[i], pool);
          if (outcome.results != expected[i].results) outcome.wrong = "other bits on threads";
          const std::lock_guard<std::mutex> lock(mutex);
          count(calls[i], outcome, &counts);
        }
      });
    for (std::thread& caller : callers) caller.join();
  }
  counts.digest = 0;  // they come in any order
  return counts;
}

Counts corpus(const char* file) {
  Pool pool(0);
  Counts counts;
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    std::vector<uint8_t> bytes;
    for (size_t i = 0; i + 1 < line.size(); i += 2)
      bytes.push_back(std::stoi(line.substr(i, 2), nullptr, 16));
    Source source(bytes.data(), bytes.size());
    const Drawn call = draw(source, nullptr, -1, true);
    count(call, evaluate(call, pool), &counts);
  }
  return counts;
}

}  // namespace

#if defined(FUZZ)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static Pool pool(0);
  Source source(bytes, size);
  const Drawn call = draw(source, nullptr, -1, true);
  const Outcome outcome = evaluate(call, pool);
  if (outcome.wrong.empty()) return 0;
  print(call, outcome);
  std::abort();
}

#else

int main(int size, char** arguments) {
  const std::string what = size > 2 ? arguments[1] : "";
  const auto argument = [&](int i) { return size > i ? std::atoll(arguments[i]) : 1; };
  const Counts counts = what == "sizes"       ? sizes(argument(2))
                        : what == "modifiers" ? modifiers(argument(2))
                        : what == "random"    ? random(argument(2), argument(3))
                        : what == "threads"   ? threads(argument(2))
                        : what == "corpus"    ? corpus(arguments[2])
                                              : Counts();
  std::printf("%s on %s: %lld calls, %lld refused, %lld compared, %lld wrong, digest %016llx\n",
              what.c_str(), instruction_set(), static_cast<long long>(counts.calls),
              static_cast<long long>(counts.refused), static_cast<long long>(counts.compared),
              static_cast<long long>(counts.wrong), static_cast<unsigned long long>(counts.digest));
  return counts.calls == 0 || counts.wrong > 0;
}

#endif
