// What the handlers of every platform share: their signature, and the checks that turn XLA's
// buffers into a Problem. JAX has validated the call already; these checks keep a call from
// elsewhere from reading past a buffer.
//
// Three targets, one signature:
//     jax_bce_v1_loss            (logits, labels, scale) -> loss
//     jax_bce_v1_loss_and_grad   (logits, labels, scale) -> loss, gradient
//     jax_bce_v1_grad            (logits, labels, scale) -> gradient
// The operands have one rank and are broadcast against each other (dimensions of size 1); the
// gradient has their common shape. `reduced_rank` trailing dimensions are summed into the loss.
#pragma once

#include <algorithm>
#include <string>

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
      .RemainingRets()
      .template Attr<int64_t>("reduced_rank")
      .template Attr<int64_t>("count");
}

inline bool to_type(ffi::DataType from, Type* to) {
  switch (from) {
    case ffi::DataType::F16:
      *to = Type::kF16;
      return true;
    case ffi::DataType::BF16:
      *to = Type::kBF16;
      return true;
    case ffi::DataType::F32:
      *to = Type::kF32;
      return true;
    case ffi::DataType::F64:
      *to = Type::kF64;
      return true;
    case ffi::DataType::PRED:
      *to = Type::kBool;
      return true;
    case ffi::DataType::S8:
      *to = Type::kI8;
      return true;
    case ffi::DataType::U8:
      *to = Type::kU8;
      return true;
    case ffi::DataType::S16:
      *to = Type::kI16;
      return true;
    case ffi::DataType::S32:
      *to = Type::kI32;
      return true;
    case ffi::DataType::S64:
      *to = Type::kI64;
      return true;
    default:
      return false;
  }
}

inline bool is_float(Type type) { return type <= Type::kF64; }

// Describes the call, or says what is wrong with it.
inline ffi::Error describe(ffi::AnyBuffer logits, ffi::AnyBuffer labels, ffi::AnyBuffer scale,
                           ffi::RemainingRets results, bool loss, bool gradient,
                           int64_t reduced_rank, int64_t count, Problem* problem) {
  const auto invalid = [](const std::string& what) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jax_bce: " + what);
  };
  const ffi::AnyBuffer buffers[] = {logits, labels, scale};
  Operand* operands[] = {&problem->logits, &problem->labels, &problem->scale};
  const char* names[] = {"logits", "labels", "scale"};
  const int64_t rank = logits.dimensions().size();
  if (rank > kMaxRank) return invalid("rank " + std::to_string(rank) + " exceeds 16");
  if (reduced_rank < 0 || reduced_rank > rank)
    return invalid("reduced_rank " + std::to_string(reduced_rank) + " exceeds the rank");
  if (count < 1) return invalid("count must be positive, got " + std::to_string(count));

  int64_t shape[kMaxRank], strides[3][kMaxRank], elements = 1;
  std::fill_n(shape, rank, 1);
  for (int i = 0; i < 3; ++i) {
    const auto dimensions = buffers[i].dimensions();
    if (static_cast<int64_t>(dimensions.size()) != rank)
      return invalid(std::string(names[i]) + " and logits differ in rank");
    if (!to_type(buffers[i].element_type(), &operands[i]->type))
      return invalid(std::string(names[i]) + " have an unsupported dtype");
    operands[i]->data = buffers[i].untyped_data();
    int64_t stride = 1;
    for (int64_t d = rank - 1; d >= 0; --d) {
      if (dimensions[d] != 1) {
        if (shape[d] != 1 && shape[d] != dimensions[d])
          return invalid(std::string(names[i]) + " cannot be broadcast in dimension " +
                         std::to_string(d));
        shape[d] = dimensions[d];
      }
      strides[i][d] = dimensions[d] == 1 ? 0 : stride;
      stride *= dimensions[d];
    }
  }
  for (int64_t d = 0; d < rank; ++d) elements *= shape[d];
  const Type arithmetic = problem->logits.type == Type::kF64 ? Type::kF64 : Type::kF32;
  if (!is_float(problem->logits.type)) return invalid("logits must be floating-point");
  if (problem->scale.type != arithmetic)
    return invalid("scale must be float64 for float64 logits, else float32");

  // Adjacent dimensions that every operand steps through alike become one. The row comes first.
  int64_t merged_shape[kMaxRank + 1] = {1}, merged_strides[3][kMaxRank + 1] = {};
  int merged = 1, first = 0;
  for (int64_t d = rank - 1; d >= 0; --d) {
    if (reduced_rank > 0 && d == rank - reduced_rank - 1) first = merged++, merged_shape[first] = 1;
    if (shape[d] == 1) continue;
    bool alike = merged_shape[first] != 1;
    for (int i = 0; i < 3; ++i)
      alike = alike && strides[i][d] == merged_strides[i][first] * merged_shape[first];
    if (!alike && merged_shape[first] != 1) {
      if (d >= rank - reduced_rank)
        return invalid("an operand is broadcast in some of the reduced dimensions only");
      first = merged++;
      merged_shape[first] = 1;
    }
    if (merged_shape[first] == 1)
      for (int i = 0; i < 3; ++i) merged_strides[i][first] = strides[i][d];
    merged_shape[first] *= shape[d];
  }
  if (merged > kMaxRank) return invalid("too many dimensions");
  problem->rank = merged;
  for (int d = 0; d < merged; ++d) {
    problem->shape[merged - 1 - d] = merged_shape[d];
    for (int i = 0; i < 3; ++i) operands[i]->strides[merged - 1 - d] = merged_strides[i][d];
  }
  problem->reduce = loss && reduced_rank > 0;
  problem->count = count;
  if (problem->reduce && problem->scale.strides[merged - 1] != 0)
    return invalid("scale must not vary along the reduced dimensions");

  if (results.size() != size_t{loss} + size_t{gradient}) return invalid("wrong number of results");
  int next = 0;
  for (Result* result :
       {loss ? &problem->loss : nullptr, gradient ? &problem->gradient : nullptr}) {
    if (!result) continue;
    const bool reduced = result == &problem->loss && problem->reduce;
    ffi::Result<ffi::AnyBuffer> buffer = *results.get<ffi::AnyBuffer>(next++);
    const size_t expected = reduced ? problem->rows() : elements;
    if (buffer->element_count() != expected)
      return invalid("a result has " + std::to_string(buffer->element_count()) +
                     " elements instead of " + std::to_string(expected));
    if (!to_type(buffer->element_type(), &result->type) || !is_float(result->type) ||
        (result->type == Type::kF64) != (arithmetic == Type::kF64) ||
        (reduced && result->type != arithmetic))
      return invalid("a result has an unsupported dtype");
    result->data = buffer->untyped_data();
  }
  return ffi::Error::Success();
}

}  // namespace jax_bce
