// A call of a handler without XLA: drawn at random, with memory that faults right before and behind
// every array, and compared with the definition in long double. With -DON_CUDA the handlers are
// those for platform "CUDA", and the kernel's source runs on the host (../../cuda_kernel/on_host/).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(ON_CUDA)
#define BCE_CUDA_MACHINE_CODE 0
#define BCE_CUDA_PTX 0
#include "../../../csrc/ffi_cuda.cc"
#else
#include "../../../csrc/ffi_cpu.cc"
#endif
#include "../../pool.h"

#if defined(ONE_INSTRUCTION_SET)  // the other is the same
namespace jax_bce::avx512 {
const CpuLoop kFloat32 = baseline::kFloat32, kFloat64 = baseline::kFloat64;
}  // namespace jax_bce::avx512
#endif

namespace jax_bce {

#if defined(ON_CUDA)
constexpr bool kOnCuda = true;
std::string known_answer(int) { return ""; }
std::string known_answer_of_devices_in_use() { return ""; }
inline const char* instruction_set() { return "cuda"; }
constexpr XLA_FFI_Handler* kHandlers[] = {BceLoss, BceLossAndGrad, BceGrad, BceTotal};
#else
constexpr bool kOnCuda = false;
constexpr int64_t cuda_workspace(int64_t, int64_t) { return 0; }
inline const char* instruction_set() { return kernel ? kernel->instruction_set : "no kernel"; }
constexpr XLA_FFI_Handler* kHandlers[] = {BceLoss, BceLossAndGrad, BceGrad, BceTotal,
                                          BceHessAndGrad};
#endif
constexpr int kTargets = std::size(kHandlers);

// Choices from the bytes of a fuzzer, or from a seed.
class Source {
 public:
  explicit Source(uint64_t seed) : random_(seed) {}
  Source(const uint8_t* bytes, size_t size) : bytes_(bytes), left_(size) {}

  // A number below `end`. Without bytes that are left, 0.
  uint64_t below(uint64_t end) {
    if (!bytes_) return random_() % end;
    uint64_t value = 0;
    for (uint64_t rest = end - 1; rest > 0 && left_ > 0; rest >>= 8, --left_)
      value = value << 8 | *bytes_++;
    return value % end;
  }
  bool chance(int of) { return below(of) == of - 1u; }
  template <class T, size_t n>
  T of(const T (&values)[n]) {
    return values[below(n)];
  }

 private:
  std::mt19937_64 random_;
  const uint8_t* bytes_ = nullptr;
  size_t left_ = 0;
};

using Shape = std::vector<int64_t>;

inline int64_t size_of(const Shape& shape) {
  int64_t size = 1;
  for (int64_t dimension : shape) size *= dimension;
  return size;
}

struct Buffer {
  ffi::DataType type;
  Shape shape;

  int64_t size() const { return size_of(shape); }
  int64_t width() const { return static_cast<int64_t>(ffi::ByteWidth(type)); }
  int64_t bytes() const { return size() * width(); }
};

struct Drawn {
  int target;  // loss, loss_and_grad, grad, total, hess_and_grad
  std::vector<Buffer> operands, results;
  int64_t modifiers, reduced_rank, count;
  bool tame;       // numbers of which the definition in long double is close to the results
  uint64_t seed;   // of the numbers
  unsigned flags;  // of the caller's floating-point mode

  bool loss() const { return target != 2; }
  bool gradient() const { return target == 1 || target == 2 || hessian(); }
  bool hessian() const { return target == 4; }  // in the place of the loss
};

constexpr ffi::DataType kFloats[] = {ffi::DataType::F16, ffi::DataType::BF16, ffi::DataType::F32,
                                     ffi::DataType::F64};
constexpr ffi::DataType kForeign[] = {ffi::DataType::C64, ffi::DataType::U16, ffi::DataType::U32,
                                      ffi::DataType::S4, ffi::DataType::F8E5M2};

inline ffi::DataType any_type(Source& source) { return std::get<1>(source.of(kTypes)); }

constexpr int64_t kMostElements = 3 * kBlock + 100;

inline Shape any_shape(Source& source) {
  constexpr int64_t kSizes[] = {0,  1,  1,  2,  3,  4,  5,  7,   8,   15,  16,  17,  31,  32,
                                33, 63, 64, 95, 96, 97, 99, 127, 128, 255, 256, 257, 512, 1023};
  Shape shape(source.below(5));
  for (int64_t& dimension : shape) dimension = source.of(kSizes);
  if (!shape.empty() && source.chance(3)) shape.back() = source.below(kMostElements);
  // Also where a 0 is among them, which an operand may have a 1 in the place of.
  const auto size = [&] {
    int64_t size = 1;
    for (int64_t dimension : shape) size *= std::max<int64_t>(1, dimension);
    return size;
  };
  for (size_t d = 0; size() > kMostElements; ++d) shape[d] = 1;
  return shape;
}

// With ones in the place of some dimensions, of those behind the first `together` in all or none.
inline Shape broadcast(Source& source, Shape shape, int64_t together) {
  const int64_t rank = shape.size();
  if (source.chance(3)) return {};
  if (source.chance(2)) return shape;
  for (int64_t d = 0; d < together; ++d)
    if (source.chance(2)) shape[d] = 1;
  if (source.chance(2))
    for (int64_t d = together; d < rank; ++d) shape[d] = 1;
  return shape;
}

// A call that the handlers should take; or, if `may_be_wrong`, perhaps not.
inline Drawn draw(Source& source, const Shape* given_shape = nullptr, int64_t modifiers = -1,
                  bool may_be_wrong = false) {
  Drawn call;
  const Shape shape = given_shape ? *given_shape : any_shape(source);
  const int64_t rank = shape.size();
  constexpr int kOrder[] = {0, 1, 2, kOnCuda ? 1 : 4, 3};
  call.target = kOrder[source.below(rank > 0 ? 5 : 4)];
  const int64_t least = call.target == 3;  // a total is a sum
  call.reduced_rank = call.hessian() ? 0 : least + source.below(rank + 1 - least);
  const int64_t leading = rank - call.reduced_rank;
  const bool sums = call.loss() && call.reduced_rank > 0;
  const ffi::DataType logits = source.of(kFloats), labels = any_type(source);
  const bool wide = logits == ffi::DataType::F64;
  const ffi::DataType arithmetic = wide ? ffi::DataType::F64 : ffi::DataType::F32;
  const auto factor = [&] {
    Shape own = broadcast(source, shape, leading);
    for (int64_t d = leading; sums && d < static_cast<int64_t>(own.size()); ++d) own[d] = 1;
    return own;
  };
  call.operands = {{logits, shape}, {labels, broadcast(source, shape, leading)}};
  for (int i = 0; i < 2; ++i) call.operands.push_back({arithmetic, factor()});
  const bool some = source.chance(2);
  call.modifiers = modifiers >= 0 ? modifiers : some ? source.below(8 << kModifiers) : 0;
  // Both parts of a divisor, or none; gamma with the other numbers of a focal loss, or none of
  // them.
  constexpr int64_t kFocal = (1 << kModifiersOfLosses) - (1 << kModifiersOfAll),
                    kDivisors = 3 << kModifiers;
  if ((call.modifiers & kDivisors) != kDivisors) call.modifiers &= ~kDivisors;
  call.modifiers &= ~int64_t{1 << kHessFloor};
  if (call.hessian())
    call.modifiers = (call.modifiers & ~kFocal) | 1 << kHessFloor;
  else if (call.modifiers & 1 << kGamma)
    call.modifiers &= ~int64_t{1 << kPosWeight};
  else
    call.modifiers &= ~kFocal;
  for (int i = 0; i < kModifiers; ++i) {
    if (!(call.modifiers >> i & 1)) continue;
    const ffi::DataType weight = any_type(source);
    const ffi::DataType type = i == kWhere         ? ffi::DataType::PRED
                               : i == kIgnoreLabel ? labels
                                                   : weight;
    call.operands.push_back({type, broadcast(source, shape, rank)});
  }
  for (int i = 0; call.modifiers & kDivisors && i < 2; ++i)
    call.operands.push_back({arithmetic, factor()});
  const auto element = [&] { return wide ? ffi::DataType::F64 : kFloats[source.below(3)]; };
  const Shape rows(shape.begin(), shape.begin() + leading);
  // The room that sums need, or less.
  const int64_t missing = kOnCuda && may_be_wrong && source.chance(4) ? 1 + source.below(8) : 0;
  const auto groups = [&](int64_t rows) {
    const int64_t all = cuda_workspace(rows, size_of(Shape(shape.begin() + leading, shape.end())));
    return std::max<int64_t>(0, all - missing);
  };
  if (call.loss()) {
    const ffi::DataType total = source.chance(2) ? ffi::DataType::F64 : arithmetic;
    call.results.push_back({sums ? total : element(), sums ? rows : shape});
    // A sum of everything may be in parts.
    if (sums && total == ffi::DataType::F64 && size_of(rows) == 1 && source.chance(4))
      call.results[0].shape = {5 - (missing ? 3 : 0) + groups(1)};
  }
  if (call.gradient()) call.results.push_back({element(), shape});
  if (sums && call.results[0].shape == rows && groups(size_of(rows)) > 0)
    call.results.push_back({ffi::DataType::F64, {groups(size_of(rows))}});
  call.count = 1 + source.below(100);
  call.tame = source.chance(2);
  call.seed = source.below(1 << 24);
  // Subnormal results or operands are 0; or another rounding.
  call.flags = source.of({0u, 0x8000u, 0x0040u, 0x8040u, 0x2000u, 0x4000u, 0x6000u});
  if (kOnCuda) call.flags = 0;  // what a GPU does not know
  if (!may_be_wrong || !source.chance(2)) return call;

  std::vector<Buffer>& arrays = source.chance(4) ? call.results : call.operands;
  Buffer& array = arrays[source.below(arrays.size())];
  switch (source.below(8)) {
    case 0:
      array.type = source.chance(2) ? source.of(kForeign) : any_type(source);
      break;
    case 1:
      array.shape = any_shape(source);
      break;
    case 2:
      if (!array.shape.empty()) array.shape[source.below(array.shape.size())] = source.below(40);
      break;
    case 3:
      call.modifiers = static_cast<int64_t>(source.below(16 << kModifiers)) - 16;
      break;
    case 4:
      call.reduced_rank = static_cast<int64_t>(source.below(8)) - 2;
      break;
    case 5:
      call.count = static_cast<int64_t>(source.below(3)) - 1;
      break;
    case 6:
      arrays.pop_back();
      break;
    case 7:
      arrays.push_back(array);
  }
  return call;
}

// --- the numbers of an array ---------------------------------------------------------------------

inline uint16_t bits_of_half(float exact) {  // of a multiple of 1/8 below 16
  int exponent;
  const float fraction = std::frexp(std::fabs(exact), &exponent);
  const int bits = exact == 0 ? 0 : (exponent + 14) << 10 | (int(fraction * 2048) & 0x3ff);
  return bits | (std::signbit(exact) ? 0x8000 : 0);
}

inline long double value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const long double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0L + fraction, exponent - 25)
                                           : std::ldexp((long double)fraction, -24);
  return bits & 0x8000 ? -value : value;
}

template <class T>
void put(char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
template <class T>
T take(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Multiples of 1/8 with at most 8 digits, which every type here holds if they are integers from 0.
inline void put_number(ffi::DataType type, float value, char* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  switch (type) {
    case ffi::DataType::F16:
      return put(to, bits_of_half(value));
    case ffi::DataType::BF16:
      return put<uint16_t>(to, bits >> 16);
    case ffi::DataType::F32:
      return put(to, value);
    case ffi::DataType::F64:
      return put<double>(to, value);
    case ffi::DataType::S16:
      return put<int16_t>(to, value);
    case ffi::DataType::S32:
      return put<int32_t>(to, value);
    case ffi::DataType::S64:
      return put<int64_t>(to, value);
    default:
      return put<uint8_t>(to, value);
  }
}

inline long double number(ffi::DataType type, const char* from) {
  switch (type) {
    case ffi::DataType::F16:
      return value_of_half(take<uint16_t>(from));
    case ffi::DataType::BF16: {
      const uint32_t bits = uint32_t{take<uint16_t>(from)} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case ffi::DataType::F32:
      return take<float>(from);
    case ffi::DataType::F64:
      return take<double>(from);
    case ffi::DataType::S16:
      return take<int16_t>(from);
    case ffi::DataType::S32:
      return take<int32_t>(from);
    case ffi::DataType::S64:
      return take<int64_t>(from);
    case ffi::DataType::S8:
      return take<int8_t>(from);
    default:
      return take<uint8_t>(from);
  }
}

// The numbers of an operand: `name` as in `names`.
inline std::vector<char> numbers(const Drawn& call, const Buffer& array, const std::string& name,
                                 std::mt19937_64& random) {
  std::vector<char> bytes(array.bytes());
  const bool is_float = array.type == ffi::DataType::F16 || array.type == ffi::DataType::BF16 ||
                        array.type == ffi::DataType::F32 || array.type == ffi::DataType::F64;
  for (int64_t i = 0; i < array.size(); ++i) {
    const uint64_t bits = random();
    char* to = bytes.data() + i * array.width();
    if (!call.tame) {
      const uint64_t any = array.type == ffi::DataType::PRED ? bits & 1 : bits;
      std::memcpy(to, &any, std::min<int64_t>(array.width(), sizeof any));
      continue;
    }
    const auto pick = [&](std::initializer_list<float> fractions) {
      return is_float ? fractions.begin()[bits % fractions.size()] : float(bits % 3 % 2);
    };
    const float value = name == "logits"         ? (int(bits % 255) - 127) / 8.f
                        : name == "labels"       ? pick({0, 1, 0, 1, 0, 1, 0.25, 0.875})
                        : name == "scale"        ? pick({1, 2, 0.5, -1, 0, 3})
                        : name == "smoothing"    ? pick({0, 0, 0.125, 0.5, 1})
                        : name == "divisor"      ? pick({1, 2, 0.5, 3, 0})
                        : name == "divisor_low"  ? pick({0})
                        : name == "ignore_label" ? float(bits % 2)
                        : name == "where"        ? float(bits % 4 != 0)
                        : name == "hess_floor"   ? is_float * pick({0, 0, 0.125, 0.25, 0.5})
                        : name == "alpha"        ? pick({0.25, 0.5, 1, 0, 0.75})
                        : name == "gamma"        ? pick({2, 1, 4, 0, 0.5, 1.5, 3, 5})
                        : name == "gamma_pos"    ? pick({1, 2, 0, 4, 0.5, 2.5})
                        : name == "clip"         ? is_float * pick({0.125, 0, 0.5, 0.25, 0.75})
                                                 : pick({0, 1, 1, 0.5, 2, 3});
    if (array.width() <= 8 && array.type != ffi::DataType::C64) put_number(array.type, value, to);
  }
  return bytes;
}

// --- memory --------------------------------------------------------------------------------------

// An array at one end of its pages, between two that fault. The bytes beside it keep a pattern.
class Guarded {
 public:
  static constexpr char kPattern = 0x5a;

  Guarded(int64_t bytes, int64_t width, bool at_end) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    room_ = std::max<int64_t>(1, (bytes + width + page - 1) / page) * page;
    void* map = mmap(nullptr, room_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) std::abort();
    pages_ = static_cast<char*>(map) + page;
    if (mprotect(pages_, room_, PROT_READ | PROT_WRITE)) std::abort();
    std::memset(pages_, kPattern, room_);
    data_ = at_end ? pages_ + room_ - bytes : pages_;
    page_ = page;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(pages_ - page_, room_ + 2 * page_); }

  char* data() const { return data_; }
  void make_read_only() const {
    if (mprotect(pages_, room_, PROT_READ)) std::abort();
  }
  bool is_intact_beside() const {
    return std::all_of(pages_, data_, is_pattern) &&
           std::all_of(data_ + bytes_, pages_ + room_, is_pattern);
  }
  bool is_untouched() const { return std::all_of(pages_, pages_ + room_, is_pattern); }

 private:
  static bool is_pattern(char byte) { return byte == kPattern; }

  int64_t bytes_, room_, page_;
  char *pages_, *data_;
};

// --- XLA's side of a call ------------------------------------------------------------------------

inline XLA_FFI_Api make_api() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = +[](XLA_FFI_Error_Create_Args* args) {
    return reinterpret_cast<XLA_FFI_Error*>(new std::string(args->message));
  };
  api.XLA_FFI_ThreadPool_NumThreads =
      +[](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = reinterpret_cast<Pool*>(args->ctx)->num_threads();
    return nullptr;
  };
  api.XLA_FFI_ThreadPool_Schedule = +[](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    reinterpret_cast<Pool*>(args->ctx)->Schedule(
        [task = args->task, data = args->data] { task(data); });
    return nullptr;
  };
  api.XLA_FFI_Stream_Get = +[](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
    args->stream = nullptr;
    return nullptr;
  };
  return api;
}

// The handler's error, or "". `at` are the arrays' addresses.
inline std::string invoke(const Drawn& call, const std::vector<char*>& at, Pool& pool) {
  static const XLA_FFI_Api api = make_api();
  const size_t operands = call.operands.size(), all = operands + call.results.size();
  std::vector<XLA_FFI_Buffer> buffers(all);
  std::vector<void*> pointers(all);
  std::vector<Shape> shapes(all);
  for (size_t i = 0; i < all; ++i) {
    const Buffer& array = i < operands ? call.operands[i] : call.results[i - operands];
    shapes[i] = array.shape;
    buffers[i] = {sizeof(XLA_FFI_Buffer),
                  nullptr,
                  static_cast<XLA_FFI_DataType>(array.type),
                  at[i],
                  static_cast<int64_t>(array.shape.size()),
                  shapes[i].data()};
    pointers[i] = &buffers[i];
  }
  std::vector<XLA_FFI_ArgType> arg_types(operands, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(call.results.size(), XLA_FFI_RetType_BUFFER);
  const std::string words[] = {"count", "modifiers", "reduced_rank"};  // in this order
  int64_t values[] = {call.count, call.modifiers, call.reduced_rank};
  XLA_FFI_Scalar scalars[3];
  XLA_FFI_ByteSpan names[3];
  XLA_FFI_ByteSpan* name_pointers[3];
  void* scalar_pointers[3];
  XLA_FFI_AttrType attr_types[3];
  for (int i = 0; i < 3; ++i) {
    names[i] = {words[i].data(), words[i].size()};
    name_pointers[i] = &names[i];
    scalars[i] = {XLA_FFI_DataType_S64, &values[i]};
    scalar_pointers[i] = &scalars[i];
    attr_types[i] = XLA_FFI_AttrType_SCALAR;
  }
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&pool);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(operands), arg_types.data(),
                pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.results.size()),
                ret_types.data(), pointers.data() + operands};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 3, attr_types, name_pointers, scalar_pointers};
  XLA_FFI_Error* error = kHandlers[call.target](&frame);
  if (!error) return "";
  const auto message = reinterpret_cast<std::string*>(error);
  const std::string copy = *message;
  delete message;
  return copy;
}

// --- the definition ------------------------------------------------------------------------------

inline int64_t place(const Buffer& array, const Shape& at) {
  int64_t offset = 0;
  for (size_t d = 0; d < array.shape.size(); ++d)
    offset = offset * array.shape[d] + (array.shape[d] == 1 ? 0 : at[d]);
  return offset;
}

// An element's loss and derivative in the logit, and how large the terms are that they add up.
struct Element {
  long double loss, gradient, loss_scale, gradient_scale;
};

// Of the label y (smoothed) and p = y pos_weight.
inline Element cross_entropy(long double x, long double y, long double p) {
  const long double n = 1 - y, e = std::exp(-std::fabs(x)), softplus = std::log1p(e);
  const long double up = softplus + std::max(x, 0.0L), down = softplus + std::max(-x, 0.0L);
  const long double sigmoid = x >= 0 ? 1 / (1 + e) : e / (1 + e);
  const long double opposite = x >= 0 ? e / (1 + e) : 1 / (1 + e);
  return {p * down + n * up, n * sigmoid - p * opposite, std::fabs(p) * down + std::fabs(n) * up,
          std::max(std::fabs(n) * sigmoid, std::fabs(p) * opposite)};
}

// The second derivative, for t = 1 - y + p.
inline long double hessian(long double x, long double t) {
  const long double e = std::exp(-std::fabs(x));
  return t * (e / ((1 + e) * (1 + e)));
}

// As bce_focal.h defines it, for labels from 0 to 1.
inline Element focal(long double x, long double y, long double gamma_neg, long double gamma_pos,
                     long double clip, bool constant_power) {
  const long double n = 1 - y, e = std::exp(-std::fabs(x));
  const long double p = x >= 0 ? 1 / (1 + e) : e / (1 + e), m = x >= 0 ? e / (1 + e) : 1 / (1 + e);
  const bool above = clip == 0 || x > std::log(clip / (1 - clip));
  const long double v = above ? p - clip : 0, u = above ? m + clip : 1;
  const long double minus_log_u = v < 0.5L ? -std::log1p(-v) : -std::log(u);
  const long double cross = y * (std::log1p(e) + std::max(-x, 0.0L)) + n * minus_log_u;
  const long double base = y * m + n * v, gamma = y * gamma_pos + n * gamma_neg;
  const long double power = base == 0 ? gamma == 0 : std::pow(base, gamma);
  const long double up = above ? power * n * p * m / u : 0, down = power * y * m;
  const long double change =
      constant_power || base == 0 ? 0 : power * gamma * p * m * (n * above - y) / base * cross;
  return {power * cross, up - down + change, power * cross, up + down + std::fabs(change)};
}

// Why the results are not near the definition, or "".
inline std::string compare(const Drawn& call, const std::vector<std::string>& names,
                           const std::vector<std::vector<char>>& values,
                           std::vector<std::vector<char>> results) {
  const int64_t rank = call.operands[0].shape.size();
  Shape full(rank, 1);
  for (const Buffer& array : call.operands)
    for (size_t d = 0; d < array.shape.size(); ++d)
      if (full[d] == 1) full[d] = array.shape[d];
  // The number of an operand for an element, from the element's indices.
  const auto reader = [&](const char* name, long double absent) {
    const size_t i = std::find(names.begin(), names.end(), name) - names.begin();
    return [&call, &values, i, absent](const Shape& at) {
      if (i == call.operands.size()) return absent;
      const Buffer& buffer = call.operands[i];
      return number(buffer.type, &values[i][place(buffer, at) * buffer.width()]);
    };
  };
  const auto logit = reader("logits", 0), label_of = reader("labels", 0);
  const auto smoothing_of = reader("smoothing", 0), scale_of = reader("scale", 1);
  const auto divisor_of = reader("divisor", 1), divisor_low = reader("divisor_low", 0);
  const auto where = reader("where", 1), ignored = reader("ignore_label", 0);
  const auto weight_of = reader("weight", 1), sample_weight = reader("sample_weight", 1);
  const auto pos_weight = reader("pos_weight", 1), alpha_of = reader("alpha", 1);
  const auto floor = reader("hess_floor", 0), gamma = reader("gamma", 0), clip = reader("clip", 0);
  const auto has = [&](ModifierName name) { return (call.modifiers >> name & 1) != 0; };
  const auto gamma_pos = reader(has(kGammaPos) ? "gamma_pos" : "gamma", 0);
  // The contract of a focal loss has more ulp.
  const long double more = has(kGamma) ? 8 : 1;
  const bool ignores = call.modifiers >> kIgnoreLabel & 1;
  const bool sums = call.loss() && call.reduced_rank > 0;
  const bool narrow = call.operands[0].type != ffi::DataType::F64;
  // Sums of 16-bit logits are within 2^-21, of float32 ones within 2^-23.
  const long double of_sums = call.operands[0].width() == 2 ? 0x1p-21L : 0x1p-23L;
  const auto ulp = [&](ffi::DataType type, bool sum) {
    return type == ffi::DataType::F16    ? 0x1p-11L
           : type == ffi::DataType::BF16 ? 0x1p-8L
           : sum && narrow               ? of_sums
                                         : (narrow ? 0x1p-21L : 0x1p-49L);
  };
  const auto least = [](ffi::DataType type) {
    return type == ffi::DataType::F16    ? 0x1p-24L
           : type == ffi::DataType::BF16 ? 0x1p-133L
           : type == ffi::DataType::F64  ? 0x1p-1074L
                                         : 0x1p-149L;
  };
  // An element may be rounded to a subnormal number before it is multiplied by its weights, 9 at
  // most, pos_weight, 3, and factor, 6.
  const ffi::DataType arithmetic = narrow ? ffi::DataType::F32 : ffi::DataType::F64;
  constexpr long double largest = 9 * 3 * 6;
  std::string wrong;
  const auto check = [&](int result, int64_t i, long double exact, long double scale) {
    const Buffer& array = call.results[result];
    const long double found = number(array.type, &results[result][i * array.width()]);
    const bool sum = sums && result == 0;
    const long double allowed = (narrow ? 0x1p-21L : 0x1p-49L) * more * scale +
                                ulp(array.type, sum) * std::fabs(exact) + least(array.type) +
                                largest * least(arithmetic);
    if (std::fabs(found - exact) <= allowed || !wrong.empty()) return;
    char text[200];
    std::snprintf(text, sizeof text, "result %d, element %lld is %.17Lg, not %.17Lg", result,
                  static_cast<long long>(i), found, exact);
    wrong = text;
  };
  int64_t columns = 1;
  for (int64_t d = rank - call.reduced_rank; d < rank; ++d) columns *= full[d];
  const int64_t size = size_of(full);
  long double total = 0, total_scale = 0;
  const int64_t rows = sums ? size_of(Shape(full.begin(), full.end() - call.reduced_rank)) : 0;
  if (kOnCuda && rows == 1 && call.results[0].size() > 1) {  // the sum, in whatever parts
    double sum = 0;
    for (size_t at = 0; at < results[0].size(); at += sizeof sum)
      sum += take<double>(&results[0][at]);
    std::fill(results[0].begin(), results[0].end(), 0);
    put(results[0].data(), sum);
  }
  for (int64_t row = 0; sums && columns == 0 && row < rows; ++row) check(0, row, 0, 0);
  Shape at(rank);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t d = rank - 1, rest = i; d >= 0; --d) at[d] = rest % full[d], rest /= full[d];
    const long double x = logit(at), smoothing = smoothing_of(at);
    const long double label = label_of(at), y = label * (1 - smoothing) + smoothing / 2;
    const long double divisor = divisor_of(at) + divisor_low(at);
    const long double scale = scale_of(at) / call.count;
    const long double factor = scale == 0 || divisor == 0 ? 0 : scale / divisor;
    const bool exists = where(at) != 0 && !(ignores && ignored(at) == label);
    long double weight = exists ? weight_of(at) * sample_weight(at) : 0;
    Element element = {1, 0, 1, 0};  // of a total of weights
    if (call.target != 3) {
      if (has(kAlpha)) weight *= alpha_of(at) * y + (1 - alpha_of(at)) * (1 - y);
      const bool constant_power = call.modifiers & kConstantPower;
      element = has(kGamma) ? focal(x, y, gamma(at), gamma_pos(at), clip(at), constant_power)
                            : cross_entropy(x, y, y * pos_weight(at));
      if (call.hessian())
        element.loss = element.loss_scale =
            std::max(hessian(x, 1 - y + y * pos_weight(at)), floor(at));
    }
    const long double times = weight * factor;
    if (sums) {
      total += element.loss * weight;
      total_scale += std::fabs(element.loss_scale * weight);
      if ((i + 1) % columns == 0) {
        check(0, i / columns, total * factor, total_scale * std::fabs(factor) / 4);
        total = total_scale = 0;
      }
    } else if (call.loss()) {
      check(0, i, element.loss * times, std::fabs(element.loss_scale * times));
    }
    if (call.gradient())
      check(call.loss(), i, element.gradient * times, element.gradient_scale * std::fabs(times));
  }
  if (sums)
    for (int64_t spare = rows; spare < call.results[0].size(); ++spare) check(0, spare, 0, 0);
  return wrong;
}

// --- one call, all that is checked ---------------------------------------------------------------

inline std::vector<std::string> names_of(const Drawn& call) {
  std::vector<std::string> names = {"logits", "labels", "scale", "smoothing"};
  const char* const modifiers[] = {"weight", "sample_weight", "pos_weight", "where", "ignore_label",
                                   "alpha",  "gamma",         "gamma_pos",  "clip",  "hess_floor"};
  for (int i = 0; i < kModifiers; ++i)
    if (call.modifiers >> i & 1) names.push_back(modifiers[i]);
  if (call.modifiers >> kModifiers & 3) names.insert(names.end(), {"divisor", "divisor_low"});
  names.resize(call.operands.size());
  return names;
}

// The control bits of the floating-point mode. Under valgrind most of them cannot be changed.
#if defined(__x86_64__)
inline unsigned mode() { return _mm_getcsr() & ~0x3fu; }
inline void set_mode(unsigned bits) { _mm_setcsr(bits); }
#else
inline unsigned mode() { return 0; }
inline void set_mode(unsigned) {}
#endif

// Whether a long double has more digits than a double, which it does not under valgrind.
inline bool is_extended() {
  volatile long double one = 1;
  return one + 0x1p-60L != one;
}

struct Outcome {
  std::string error;  // of the handler
  std::string wrong;  // or what it did wrong
  std::vector<std::vector<char>> results;
};

inline Outcome evaluate(const Drawn& call, Pool& pool) {
  const std::vector<std::string> names = names_of(call);
  std::mt19937_64 random(call.seed);
  std::vector<std::vector<char>> values;
  for (size_t i = 0; i < names.size(); ++i)
    values.push_back(numbers(call, call.operands[i], names[i], random));

  Outcome first, now;
  for (const bool at_end : {true, false}) {
    std::vector<std::unique_ptr<Guarded>> memory;
    std::vector<char*> at;
    for (size_t i = 0; i < values.size() + call.results.size(); ++i) {
      const bool operand = i < values.size();
      const Buffer& array = operand ? call.operands[i] : call.results[i - values.size()];
      memory.push_back(std::make_unique<Guarded>(array.bytes(), array.width(), at_end));
      at.push_back(memory[i]->data());
      if (operand && array.bytes() > 0) std::memcpy(at[i], values[i].data(), array.bytes());
      if (operand) memory[i]->make_read_only();
    }
    now = {};
    const unsigned before = mode();
    set_mode(before | call.flags);
    const unsigned chosen = mode();
    now.error = invoke(call, at, pool);
    const bool same_mode = mode() == chosen;
    set_mode(before);
    if (!same_mode) now.wrong = "the caller's floating-point mode is another one now";
    for (size_t i = values.size(); i < memory.size(); ++i) {
      if (!memory[i]->is_intact_beside()) now.wrong = "something beside a result was written";
      if (!now.error.empty() && !memory[i]->is_untouched())
        now.wrong = "a result was written before the error";
      now.results.emplace_back(at[i], at[i] + call.results[i - values.size()].bytes());
    }
    if (!now.wrong.empty()) return now;
    if (at_end) first = now;
  }
  if (first.error != now.error) now.wrong = "other errors at other addresses";
  if (first.results != now.results) now.wrong = "other bits at other addresses";
  if (now.wrong.empty() && now.error.empty() && call.tame && is_extended())
    now.wrong = compare(call, names, values, now.results);
  return now;
}

inline void print(const Drawn& call, const Outcome& outcome) {
  std::printf("%s\n  target %d, modifiers %lld, reduced_rank %lld, count %lld, tame %d, seed %llu",
              outcome.wrong.c_str(), call.target, static_cast<long long>(call.modifiers),
              static_cast<long long>(call.reduced_rank), static_cast<long long>(call.count),
              call.tame, static_cast<unsigned long long>(call.seed));
  for (const std::vector<Buffer>* arrays : {&call.operands, &call.results}) {
    std::printf("\n ");
    for (const Buffer& array : *arrays) {
      std::printf(" %d(", static_cast<int>(array.type));
      for (int64_t dimension : array.shape) std::printf(" %lld", static_cast<long long>(dimension));
      std::printf(" )");
    }
  }
  std::printf("\n");
}

}  // namespace jax_bce
