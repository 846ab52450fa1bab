// The common parts of the handlers for all platforms: their signature, the checks that turn XLA's
// buffers into a Problem, and the functions of their Python modules. Python has validated a call
// already; these checks keep calls from elsewhere from reading past a buffer.
//
// Five targets, one signature:
//     jax_bce_v3_loss            (logits, labels, scale, smoothing) -> loss
//     jax_bce_v3_loss_and_grad   (logits, labels, scale, smoothing) -> loss, gradient
//     jax_bce_v3_grad            (logits, labels, scale, smoothing) -> gradient
//     jax_bce_v3_total           (logits, labels, scale, smoothing) -> loss, a sum of weights
//     jax_bce_v3_hess_and_grad   (logits, labels, scale, smoothing) -> loss, gradient
// The last is for the CPU alone. Its losses are second derivatives; it needs a hess_floor and sums
// nothing.
// More operands may follow: those of ModifierName in bce_problem.h whose bits are set in
// "modifiers", and, with the next two bits, a divisor and its rounding error, in one shape. With
// the bit after those, the gradient takes the power of a focal loss for a constant. On "CUDA", one
// more result may follow: a workspace for the sums of groups, if a row has several. The operands
// have the same rank and are broadcast against each other (dimensions of size 1); scalars are
// broadcast, too. The gradient has their common shape. `reduced_rank` trailing dimensions are
// summed into the loss, which has the arithmetic's type, or float64 if the caller adds up further.
// If everything is summed, a float64 loss may have several elements, whose sum is the loss: on
// "CUDA" at least one for each group of 1024, and then there is no workspace.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <map>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bce_problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bce {

namespace ffi = ::xla::ffi;

template <class Context>
auto Signature() {
  return ffi::Ffi::Bind()
      .template Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets()
      .template Attr<int64_t>("modifiers")
      .template Attr<int64_t>("reduced_rank")
      .template Attr<int64_t>("count");
}

constexpr std::tuple<const char*, ffi::DataType, Type> kTypes[] = {
    {"float16", ffi::DataType::F16, Type::kF16}, {"bfloat16", ffi::DataType::BF16, Type::kBF16},
    {"float32", ffi::DataType::F32, Type::kF32}, {"float64", ffi::DataType::F64, Type::kF64},
    {"bool", ffi::DataType::PRED, Type::kBool},  {"int8", ffi::DataType::S8, Type::kI8},
    {"uint8", ffi::DataType::U8, Type::kU8},     {"int16", ffi::DataType::S16, Type::kI16},
    {"int32", ffi::DataType::S32, Type::kI32},   {"int64", ffi::DataType::S64, Type::kI64}};

inline bool to_type(ffi::DataType from, Type* to) {
  for (const auto& [name, type, ours] : kTypes)
    if (type == from) return *to = ours, true;
  return false;
}

inline ffi::Error invalid(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jax_bce: " + what);
}

// The error for an exception: none may leave a handler. The message is short enough not to
// allocate.
inline ffi::Error failed(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
  return ffi::Error::Internal(error.what());
}

constexpr int kOperands = 4;
constexpr int kDivisor = kOperands, kBroadcast = kOperands + 2;  // with both parts of a divisor
constexpr int64_t kConstantPower = int64_t{1} << (kModifiers + 2);

// Broadcasts a modifier to the shape of the results, in as few dimensions as its strides allow.
inline bool broadcast_to(const ffi::AnyBuffer& buffer, int64_t rank, const int64_t* shape,
                         Modifier* modifier) {
  const auto own = buffer.dimensions();
  const int64_t own_rank = own.size();
  if (own_rank != rank && own_rank != 0) return false;
  int64_t sizes[kMaxRank] = {1}, strides[kMaxRank] = {}, next_stride = 1;
  int merged = 0;
  for (int64_t d = rank - 1; d >= 0; --d) {
    const int64_t size = own_rank == 0 ? 1 : own[d];
    if (size != 1 && size != shape[d]) return false;
    const int64_t stride = size == 1 ? 0 : next_stride;
    next_stride *= size;
    if (shape[d] == 1) continue;
    if (merged > 0 && stride == strides[merged - 1] * sizes[merged - 1]) {
      sizes[merged - 1] *= shape[d];
    } else if (merged < kMaxRank) {
      sizes[merged] = shape[d];
      strides[merged++] = stride;
    } else {
      return false;
    }
  }
  modifier->data = buffer.untyped_data();
  modifier->rank = std::max(merged, 1);
  for (int d = 0; d < modifier->rank; ++d) {
    modifier->shape[modifier->rank - 1 - d] = sizes[d];
    modifier->strides[modifier->rank - 1 - d] = strides[d];
  }
  return true;
}

// Describes the call, or says what is wrong with it. Ignores results after loss and gradient.
inline ffi::Error describe(const ffi::AnyBuffer (&buffers)[kOperands], ffi::RemainingArgs more,
                           ffi::RemainingRets results, bool loss, bool gradient, int64_t modifiers,
                           int64_t reduced_rank, int64_t count, Problem* problem) {
  Operand* operands[] = {&problem->logits,    &problem->labels,  &problem->scale,
                         &problem->smoothing, &problem->divisor, &problem->divisor_low};
  const std::string names[] = {"logits", "labels", "scale", "smoothing", "divisor", "divisor_low"};
  const char* const modifier_names[] = {"weight",       "sample_weight", "pos_weight", "where",
                                        "ignore_label", "alpha",         "gamma",      "gamma_pos",
                                        "clip",         "hess_floor"};
  const int64_t rank = buffers[0].dimensions().size();
  if (reduced_rank < 0 || reduced_rank > rank)
    return invalid("reduced_rank must be from 0 to the logits' rank " + std::to_string(rank) +
                   ", got " + std::to_string(reduced_rank));
  if (count < 1) return invalid("count must be positive, got " + std::to_string(count));
  for (int i = 0; i < kOperands; ++i) {
    const int64_t dimensions = buffers[i].dimensions().size();
    if (dimensions != rank && dimensions != 0)
      return invalid(names[i] + " and logits differ in rank");
    if (!to_type(buffers[i].element_type(), &operands[i]->type))
      return invalid(names[i] + " have an unsupported dtype");
    operands[i]->data = buffers[i].untyped_data();
  }
  if (!is_float(problem->logits.type)) return invalid("logits must be floating-point");
  const Type arithmetic = problem->logits.type == Type::kF64 ? Type::kF64 : Type::kF32;
  for (int i = 2; i < kOperands; ++i)
    if (operands[i]->type != arithmetic)
      return invalid(names[i] + " must be float64 for float64 logits, else float32");

  // The divisor comes last, in two parts.
  const int64_t parts = (modifiers & ~kConstantPower) >> kModifiers;
  const bool divides = parts == 3;
  if (parts != 0 && !divides)
    return invalid("modifiers has a bit without a meaning: " + std::to_string(modifiers));
  std::vector<std::string> more_names;
  for (int i = 0; i < kModifiers; ++i)
    if (modifiers >> i & 1) more_names.push_back(modifier_names[i]);
  if (divides) more_names.insert(more_names.end(), {names[kDivisor], names[kDivisor + 1]});
  if (more.size() != more_names.size())
    return invalid("modifiers " + std::to_string(modifiers) + " needs " +
                   std::to_string(kOperands + more_names.size()) + " operands, got " +
                   std::to_string(kOperands + more.size()));
  // The modifiers' shapes count, too.
  std::vector<ffi::AnyBuffer> all(std::begin(buffers), std::end(buffers));
  for (size_t i = 0; i < more.size(); ++i) {
    auto buffer = more.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return invalid(more_names[i] + " is no array");
    const int64_t dimensions = buffer->dimensions().size();
    if (dimensions != rank && dimensions != 0)
      return invalid(more_names[i] + " and logits differ in rank");
    all.push_back(*buffer);
  }
  problem->divisor = problem->divisor_low = {};
  const auto buffer_of = [&](int i) -> const ffi::AnyBuffer& {
    return i < kDivisor ? buffers[i] : all[all.size() - kBroadcast + i];
  };
  for (int i = kDivisor; divides && i < kBroadcast; ++i) {
    const ffi::AnyBuffer& part = buffer_of(i);
    if (!to_type(part.element_type(), &operands[i]->type) || operands[i]->type != arithmetic)
      return invalid(names[i] + " must be float64 for float64 logits, else float32");
    operands[i]->data = part.untyped_data();
  }
  const auto dimension_of = [&](int i, int64_t d) -> int64_t {
    if (i >= kDivisor && !divides) return 1;
    return buffer_of(i).dimensions().size() == 0 ? 1 : buffer_of(i).dimensions()[d];
  };
  std::vector<int64_t> full(rank, 1);
  for (const ffi::AnyBuffer& buffer : all)
    for (int64_t d = 0; d < rank && buffer.dimensions().size() > 0; ++d)
      if (full[d] == 1) full[d] = buffer.dimensions()[d];

  // From the last dimension to the first, merge adjacent dimensions if every operand allows it.
  // Dimension 0 here is the row, which is reduced, if anything is.
  int merged = 1, last = 0;
  int64_t shape[kMaxRank] = {1}, strides[kBroadcast][kMaxRank] = {};
  int64_t elements = 1, next_stride[kBroadcast] = {1, 1, 1, 1, 1, 1};
  for (int64_t d = rank - 1; d >= 0; --d) {
    const bool reduced = d >= rank - reduced_rank;
    int64_t size = full[d], stride[kBroadcast];
    for (int i = 0; i < kBroadcast; ++i) {
      const int64_t dimension = dimension_of(i, d);
      if (dimension != 1 && size != dimension)
        return invalid(names[i] + " cannot be broadcast in dimension " + std::to_string(d));
      stride[i] = dimension == 1 ? 0 : next_stride[i];
      next_stride[i] *= dimension;
    }
    elements *= size;
    if (size == 1) continue;
    bool alike = shape[last] != 1 && (reduced || last > 0 || reduced_rank == 0);
    int unlike = 0;
    for (int i = 0; i < kBroadcast && alike; ++i) {
      alike = stride[i] == strides[i][last] * shape[last];
      unlike = i;
    }
    if (!alike && (shape[last] != 1 || (!reduced && reduced_rank > 0 && last == 0))) {
      if (reduced)
        return invalid(names[unlike] + " is broadcast in some of the reduced dimensions only");
      if (merged == kMaxRank) return invalid("too many dimensions are broadcast in different ways");
      last = merged++;
      shape[last] = 1;
    }
    if (shape[last] == 1)
      for (int i = 0; i < kBroadcast; ++i) strides[i][last] = stride[i];
    shape[last] *= size;
  }
  // If rows have one element, the next element is in the next row.
  if (shape[0] == 1 && merged > 1)
    for (int i = 0; i < 2; ++i) strides[i][0] = strides[i][1] == 1;
  problem->rank = merged;
  for (int d = 0; d < merged; ++d) {
    problem->shape[merged - 1 - d] = shape[d];
    for (int i = 0; i < kBroadcast; ++i) operands[i]->strides[merged - 1 - d] = strides[i][d];
  }
  problem->reduce = loss && reduced_rank > 0;
  problem->inverse_count = 1.0 / count;
  for (int i : {2, kDivisor, kDivisor + 1})
    if (problem->reduce && operands[i]->strides[merged - 1] != 0)
      return invalid(names[i] + " must not vary along the reduced dimensions");
  for (int d = 0; divides && d < merged; ++d)
    if (problem->divisor.strides[d] != problem->divisor_low.strides[d])
      return invalid("divisor and divisor_low differ in shape");

  int next_modifier = kOperands;
  problem->modified = modifiers & ((1 << kAlpha) - 1);
  for (int i = 0; i < kModifiers; ++i) {
    const std::string name = modifier_names[i];
    if (!(modifiers >> i & 1)) continue;
    Modifier& modifier = problem->modifiers[i];
    const ffi::AnyBuffer& buffer = all[next_modifier++];
    if (!to_type(buffer.element_type(), &modifier.type) ||
        (i == kWhere && modifier.type != Type::kBool) ||
        (i == kIgnoreLabel && modifier.type != problem->labels.type))
      return invalid(name + " has an unsupported dtype");
    if (!broadcast_to(buffer, rank, full.data(), &modifier))
      return invalid(name + " cannot be broadcast to the results, or in too many ways");
  }
  const auto has = [&](ModifierName name) { return (modifiers >> name & 1) != 0; };
  if (!has(kGamma) && (has(kAlpha) || has(kGammaPos) || has(kClip)))
    return invalid("gamma is missing");
  if (has(kGamma) && has(kPosWeight)) return invalid("focal loss has no pos_weight");
  if (has(kGamma) && problem->hessian) return invalid("hess_and_grad has no gamma");
  if (has(kHessFloor) != problem->hessian)
    return invalid(problem->hessian ? "hess_floor is missing"
                                    : "only hess_and_grad has a hess_floor");
  problem->constant_power = (modifiers & kConstantPower) != 0;

  const size_t expected[] = {static_cast<size_t>(problem->reduce ? problem->rows() : elements),
                             static_cast<size_t>(elements)};
  size_t next = 0;
  for (Result* result : {&problem->loss, &problem->gradient}) {
    const bool is_loss = result == &problem->loss;
    if (!(is_loss ? loss : gradient)) continue;
    const std::string name = is_loss ? "loss" : "gradient";
    auto buffer = results.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value()) return invalid("the result " + name + " is missing");
    const bool in_parts = is_loss && problem->reduce && problem->rows() == 1 &&
                          (*buffer)->element_type() == ffi::DataType::F64 &&
                          (*buffer)->element_count() > 1;
    if (in_parts) problem->parts = (*buffer)->element_count();
    if ((*buffer)->element_count() != expected[!is_loss] && !in_parts)
      return invalid(name + " has " + std::to_string((*buffer)->element_count()) +
                     " elements instead of " + std::to_string(expected[!is_loss]));
    if (!to_type((*buffer)->element_type(), &result->type) || !is_float(result->type))
      return invalid(name + " has an unsupported dtype");
    const bool summed = is_loss && problem->reduce, wide = result->type == Type::kF64;
    if (summed ? !wide && result->type != arithmetic : wide != (arithmetic == Type::kF64))
      return invalid(name + " has an unsupported dtype");
    result->data = (*buffer)->untyped_data();
  }
  return ffi::Error::Success();
}

// An array as known when JAX lowers a call: the name of its dtype, and its shape.
using Array = std::pair<std::string, std::vector<int64_t>>;

// The error that the handler of any platform would return for a call, or "".
inline std::string refusal(std::vector<Array> operands, std::vector<Array> results, bool loss,
                           bool gradient, int64_t modifiers, int64_t reduced_rank, int64_t count) {
  const auto buffers = [](std::vector<Array>& arrays) {
    std::vector<XLA_FFI_Buffer> buffers;
    for (auto& [dtype, shape] : arrays) {
      ffi::DataType type = ffi::DataType::INVALID;
      for (const auto& [name, from, to] : kTypes)
        if (dtype == name) type = from;
      buffers.push_back({sizeof(XLA_FFI_Buffer), nullptr, static_cast<XLA_FFI_DataType>(type),
                         nullptr, static_cast<int64_t>(shape.size()), shape.data()});
    }
    return buffers;
  };
  const auto addresses = [](std::vector<XLA_FFI_Buffer>& buffers) {
    std::vector<void*> addresses;
    for (XLA_FFI_Buffer& buffer : buffers) addresses.push_back(&buffer);
    return addresses;
  };
  if (operands.size() < kOperands) return "an operand is missing";
  auto in = buffers(operands), out = buffers(results);
  auto in_addresses = addresses(in), out_addresses = addresses(out);
  std::vector<XLA_FFI_ArgType> in_types(in.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> out_types(out.size(), XLA_FFI_RetType_BUFFER);
  const XLA_FFI_Args args{sizeof args, nullptr, static_cast<int64_t>(in.size()), in_types.data(),
                          in_addresses.data()};
  const XLA_FFI_Rets rets{sizeof rets, nullptr, static_cast<int64_t>(out.size()), out_types.data(),
                          out_addresses.data()};
  Problem problem;
  problem.hessian = modifiers >> kHessFloor & 1;  // no other call has one
  const auto operand = [&](int i) { return ffi::AnyBuffer(&in[i]); };
  return describe({operand(0), operand(1), operand(2), operand(3)}, {&args, kOperands}, {&rets, 0},
                  loss, gradient, modifiers, reduced_rank, count, &problem)
      .message();
}

// The functions of the Python modules _cpu and _cuda, for the handler of each kind. `initialize`,
// unless it is null, is called before a program that has calls.
inline void define_module(pybind11::module_& module,
                          const std::map<std::string, XLA_FFI_Handler*>& kinds,
                          XLA_FFI_Handler* initialize = nullptr) {
  module.def("registrations", [=] {
    const auto stages = [=](XLA_FFI_Handler* handler) {
      pybind11::dict handlers;
      handlers["execute"] = pybind11::capsule(reinterpret_cast<void*>(handler));
      if (initialize)
        handlers["initialize"] = pybind11::capsule(reinterpret_cast<void*>(initialize));
      return handlers;
    };
    pybind11::dict targets;
    for (const auto& [kind, handler] : kinds)
      targets[("jax_bce_v3_" + kind).c_str()] = stages(handler);
    return targets;
  });
  module.attr("xla_ffi_api_version") = pybind11::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_bce
