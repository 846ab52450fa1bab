// The CUDA loop. A warp evaluates a group of a row's elements, a thread block of eight warps a
// block of a long row, or eight short rows; what the blocks of a row add up to is added by a second
// kernel. The order is that of bce_problem.h.
//
// A kernel is compiled for each logits dtype and each width of a label. Everything else, the
// labels' dtype among it, is the same for all threads and decided while the kernel runs: once for
// four elements, which a thread loads, evaluates and stores together.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "bce_cuda.h"
#include "bce_math.h"

namespace jax_bce {
namespace {

constexpr int kWarp = kFold, kWarps = kGroupsInBlock, kThreads = kWarp * kWarps;

// One element at a time.
template <class T>
struct Lane {
  using Scalar = T;
  using Float = T;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static BCE_INLINE T set(T value) { return value; }
  static BCE_INLINE T select(bool mask, T yes, T no) { return mask ? yes : no; }
  static BCE_INLINE T min(T a, T b) { return ::fmin(a, b); }
  static BCE_INLINE T max(T a, T b) { return ::fmax(a, b); }
  static BCE_INLINE T fma(T a, T b, T c) { return ::fma(a, b, c); }

  // In float32 for 0 <= a <= 1 <= b <= 3. A third of the instructions of a division that is rounded
  // right for all operands; for these it is, too, but for a few of 2^27, where an ulp in the
  // quotient is made up for by the remainder, which the formulas carry along.
  static BCE_INLINE T divide(T a, T b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) {
      float reciprocal;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
      const float quotient = a * reciprocal;
      return fma(fma(-b, quotient, a), reciprocal, quotient);
    }
#endif
    return a / b;
  }

  static BCE_INLINE Bits to_bits(T value) {
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  static BCE_INLINE T from_bits(Bits bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

__device__ float convert(__half value) { return __half2float(value); }
__device__ float convert(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float convert(float value) { return value; }
__device__ double convert(double value) { return value; }

__device__ void round_to(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void round_to(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ void round_to(float* to, float value) { *to = value; }
__device__ void round_to(double* to, double value) { *to = value; }

// A label of the type from its bits.
template <class Scalar>
__device__ Scalar label_of(Type type, uint8_t bits) {
  return type == Type::kI8 ? static_cast<int8_t>(bits) : bits;
}
template <class Scalar>
__device__ Scalar label_of(Type type, uint16_t bits) {
  if (type == Type::kI16) return static_cast<int16_t>(bits);
  return type == Type::kF16 ? __half2float(__ushort_as_half(bits))
                            : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <class Scalar>
__device__ Scalar label_of(Type type, uint32_t bits) {
  return type == Type::kF32 ? __uint_as_float(bits)
                            : static_cast<Scalar>(static_cast<int32_t>(bits));
}
template <class Scalar>
__device__ Scalar label_of(Type type, uint64_t bits) {
  return static_cast<Scalar>(type == Type::kF64 ? __longlong_as_double(static_cast<long long>(bits))
                                                : static_cast<Scalar>(static_cast<int64_t>(bits)));
}

// Four elements as they are stored: one transfer, or two of 16 bytes.
template <class Stored>
struct alignas(sizeof(Stored) * kQuad < 16 ? sizeof(Stored) * kQuad : 16) Quad {
  Stored values[kQuad];
};

template <class Stored>
__device__ bool is_aligned(const Stored* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Quad<Stored>) == 0;
}

// A group of an operand.
template <class Stored>
struct Stream {
  const Stored* data;
  bool broadcast, aligned;

  __device__ Stream(const Operand& operand, int rank, int64_t row_start, int64_t begin) {
    broadcast = operand.strides[rank - 1] == 0;
    data = static_cast<const Stored*>(operand.data) + row_start + (broadcast ? 0 : begin);
    aligned = !broadcast && is_aligned(data);
  }

  // Elements index, ..., index + 3, of which the first `left` exist: nothing else is read.
  __device__ Quad<Stored> load(int index, int left, Stored padding) const {
    if (aligned && left >= kQuad) return *reinterpret_cast<const Quad<Stored>*>(data + index);
    Quad<Stored> quad;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c)
      quad.values[c] = c < left ? data[broadcast ? 0 : index + c] : padding;
    return quad;
  }
};

template <class Stored, class Scalar>
__device__ void store_as(void* data, int64_t offset, int left, const Scalar* values) {
  Stored* to = static_cast<Stored*>(data) + offset;
  Quad<Stored> quad;
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c) round_to(quad.values + c, values[c]);
  if (left >= kQuad && is_aligned(to)) {
    *reinterpret_cast<Quad<Stored>*>(to) = quad;
    return;
  }
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c)
    if (c < left) to[c] = quad.values[c];
}

// Results have the logits' type or the arithmetic's.
template <class Logit, class Scalar>
__device__ bool is_narrow(const Result& result) {
  return !std::is_same_v<Logit, Scalar> && result.type != Type::kF32;
}

// A result times its factor, ready to be rounded to its type.
template <class Logit, class Scalar>
__device__ Scalar scaled(Pair<Scalar> value, Scalar factor, bool narrow) {
  value = fast_two_sum(value.high, value.low);
  // As in bce_cpu.cc, bfloat16 does not need it.
  if constexpr (std::is_same_v<Logit, __half>)
    if (narrow) value.high = round_to_odd<Lane<Scalar>>(value.high, value.low);
  return value.high * factor;
}

template <class Logit, class Scalar>
__device__ void store(const Result& result, bool narrow, int64_t offset, int left,
                      const Scalar* values) {
  if (narrow)
    store_as<Logit>(result.data, offset, left, values);
  else
    store_as<Scalar>(result.data, offset, left, values);
}

__device__ double fold(double number) {
  BCE_UNROLL
  for (int half = kWarp / 2; half > 0; half /= 2)
    number += __shfl_down_sync(0xffffffff, number, half);
  return number;
}

// The sum of the warps' numbers, for the first thread of the thread block.
__device__ double sum_of_warps(double number) {
  __shared__ double numbers[kWarps];
  number = fold(number);
  if (threadIdx.x % kWarp == 0) numbers[threadIdx.x / kWarp] = number;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += numbers[warp];
  __syncthreads();  // before the next row overwrites them
  return sum;
}

template <class Scalar>
__device__ void finish_row(const Problem& problem, int64_t row, int64_t scale_start, double sum) {
  const double scale = static_cast<const Scalar*>(problem.scale.data)[scale_start];
  static_cast<Scalar*>(problem.loss.data)[row] =
      static_cast<Scalar>(sum * scale * problem.inverse_count);
}

// Evaluates this thread's elements of the group that begins in the row at `begin`. Returns their
// sum if problem.reduce.
template <class Logit, class Label>
__device__ double evaluate_group(const Problem& problem, int64_t row, const RowStart& start,
                                 int64_t begin) {
  using Scalar = decltype(convert(Logit()));
  using L = Lane<Scalar>;
  const int64_t columns = problem.columns();
  const Stream<Logit> logits(problem.logits, problem.rank, start.logits, begin);
  const Stream<Label> labels(problem.labels, problem.rank, start.labels, begin);
  // Of a row, seldom of an element.
  const bool one_factor = problem.scale.strides[problem.rank - 1] == 0;
  const bool one_smoothing = problem.smoothing.strides[problem.rank - 1] == 0;
  const auto factor_at = [&](int64_t i) {
    const Scalar scale = static_cast<const Scalar*>(problem.scale.data)[start.scale + i];
    return static_cast<Scalar>(scale * problem.inverse_count);
  };
  const auto smoothing_at = [&](int64_t i) {
    return static_cast<const Scalar*>(problem.smoothing.data)[start.smoothing + i];
  };
  const Scalar row_factor = factor_at(0), row_smoothing = smoothing_at(0);
  const int64_t result_start = row * columns + begin;
  const bool with_loss = problem.loss.data, with_gradient = problem.gradient.data;
  const bool narrow_loss = is_narrow<Logit, Scalar>(problem.loss);
  const bool narrow_gradient = is_narrow<Logit, Scalar>(problem.gradient);

  // What is not there, with label 0 and no smoothing, has a loss of exactly 0.
  Logit minus_infinity;
  round_to(&minus_infinity, -Format<Scalar>::kInfinity);
  const int lane = threadIdx.x % kWarp;
  int index = lane / 8 * 256 + lane % 8 * kQuad;
  const int behind = (lane / 8 + 1) * 256;
  const int end = columns - begin < behind ? static_cast<int>(columns - begin) : behind;
  Quad<Logit> next_logits = logits.load(index, end - index, minus_infinity);
  Quad<Label> next_labels = labels.load(index, end - index, 0);
  double high[kQuad] = {};
  Scalar low[kQuad] = {};
#pragma unroll 1
  for (; index < end; index += 32) {
    const Quad<Logit> stored_logits = next_logits;
    const Quad<Label> stored_labels = next_labels;
    const int left = end - index;
    // On their way while these are evaluated.
    if (left > 32) {
      next_logits = logits.load(index + 32, left - 32, minus_infinity);
      next_labels = labels.load(index + 32, left - 32, 0);
    }

    Scalar x[kQuad], y[kQuad];
    bool common = one_smoothing && row_smoothing == 0;
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      x[c] = convert(stored_logits.values[c]);
      y[c] = label_of<Scalar>(problem.labels.type, stored_labels.values[c]);
      common = common && magnitude_of<L>(x[c]) <= Format<Scalar>::kCommon &&
               L::fma(y[c], y[c], -y[c]) == 0;
    }
    Scalar loss[kQuad], gradient[kQuad];
    const auto evaluate = [&](auto is_common) {
      constexpr bool kCommon = decltype(is_common)::value;
      BCE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        const Exponential<L> exponential = exp_of<L, kCommon>(x[c]);
        const Scalar factor = one_factor || c >= left ? row_factor : factor_at(begin + index + c);
        Scalar smoothing = 0;
        if (!kCommon && c < left)
          smoothing = one_smoothing ? row_smoothing : smoothing_at(begin + index + c);
        if (with_loss) {
          const Pair<Scalar> pair = loss_of<L, kCommon>(x[c], y[c], smoothing, exponential);
          if (problem.reduce) {
            high[c] += pair.high;
            low[c] += pair.low;
          } else {
            loss[c] = scaled<Logit>(pair, factor, narrow_loss);
          }
        }
        if (with_gradient)
          gradient[c] = scaled<Logit>(gradient_of<L, kCommon>(x[c], y[c], smoothing, exponential),
                                      factor, narrow_gradient);
      }
    };
    if (common)
      evaluate(std::true_type());
    else
      evaluate(std::false_type());

    if (with_loss && !problem.reduce)
      store<Logit>(problem.loss, narrow_loss, result_start + index, left, loss);
    if (with_gradient)
      store<Logit>(problem.gradient, narrow_gradient, result_start + index, left, gradient);
  }
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c) high[c] += low[c];
  return (high[0] + high[2]) + (high[1] + high[3]);
}

// Rows of at most a group: a warp for each.
template <class Logit, class Label>
__global__ void __launch_bounds__(kThreads, sizeof(Logit) == 8 || sizeof(Label) == 8 ? 2 : 3)
    short_rows(const Problem problem) {
  const int64_t rows = problem.rows();
  const int64_t first = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  for (int64_t row = first; row < rows; row += gridDim.x * int64_t{kWarps}) {
    const RowStart start = problem.row_start(row);
    const double sum = evaluate_group<Logit, Label>(problem, row, start, 0);
    if (!problem.reduce) continue;
    const double total = fold(sum);
    if (threadIdx.x % kWarp == 0)
      finish_row<decltype(convert(Logit()))>(problem, row, start.scale, total);
  }
}

// Longer rows: a thread block for each block.
template <class Logit, class Label>
__global__ void __launch_bounds__(kThreads, sizeof(Logit) == 8 || sizeof(Label) == 8 ? 2 : 3)
    long_rows(const Problem problem, double* workspace) {
  const int64_t rows = problem.rows();
  const int64_t begin = blockIdx.x * kBlock + threadIdx.x / kWarp * kGroup;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const RowStart start = problem.row_start(row);
    const double sum =
        begin < problem.columns() ? evaluate_group<Logit, Label>(problem, row, start, begin) : 0;
    if (!problem.reduce) continue;
    const double total = sum_of_warps(sum);
    if (threadIdx.x != 0) continue;
    if (gridDim.x == 1)
      finish_row<decltype(convert(Logit()))>(problem, row, start.scale, total);
    else
      workspace[row * gridDim.x + blockIdx.x] = total;
  }
}

// Adds up the blocks of each row.
template <class Scalar>
__global__ void __launch_bounds__(kThreads)
    sum_of_blocks(const Problem problem, const double* workspace, int64_t blocks) {
  const int64_t rows = problem.rows();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += kThreads)
      sum += workspace[row * blocks + block];
    sum = sum_of_warps(sum);
    if (threadIdx.x == 0) finish_row<Scalar>(problem, row, problem.row_start(row).scale, sum);
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t width, int64_t height,
                   CUstream_st* stream, const Arguments&... arguments) {
  // What exceeds the largest grid is left to the kernels' loops over rows.
  constexpr int64_t kMaxWidth = 0x7fffffff, kMaxHeight = 0xffff;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(width < kMaxWidth ? width : kMaxWidth),
                        static_cast<unsigned>(height < kMaxHeight ? height : kMaxHeight));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Logit, class Label>
cudaError_t launch_for(const Problem& problem, double* workspace, CUstream_st* stream) {
  const int64_t rows = problem.rows(), columns = problem.columns();
  if (columns <= kGroup)
    return launch(short_rows<Logit, Label>, (rows + kWarps - 1) / kWarps, 1, stream, problem);
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  const cudaError_t error =
      launch(long_rows<Logit, Label>, blocks, rows, stream, problem, workspace);
  if (error != cudaSuccess || !problem.reduce || blocks == 1) return error;
  using Scalar = decltype(convert(Logit()));
  return launch(sum_of_blocks<Scalar>, rows, 1, stream, problem, workspace, blocks);
}

template <class Logit>
cudaError_t launch_for(const Problem& problem, double* workspace, CUstream_st* stream) {
  switch (problem.labels.type) {
    case Type::kBool:
    case Type::kI8:
    case Type::kU8:
      return launch_for<Logit, uint8_t>(problem, workspace, stream);
    case Type::kF16:
    case Type::kBF16:
    case Type::kI16:
      return launch_for<Logit, uint16_t>(problem, workspace, stream);
    case Type::kF32:
    case Type::kI32:
      return launch_for<Logit, uint32_t>(problem, workspace, stream);
    case Type::kF64:
    case Type::kI64:
      break;
  }
  return launch_for<Logit, uint64_t>(problem, workspace, stream);
}

cudaError_t launch_for(const Problem& problem, double* workspace, CUstream_st* stream) {
  switch (problem.logits.type) {
    case Type::kF16:
      return launch_for<__half>(problem, workspace, stream);
    case Type::kBF16:
      return launch_for<__nv_bfloat16>(problem, workspace, stream);
    case Type::kF64:
      return launch_for<double>(problem, workspace, stream);
    default:
      return launch_for<float>(problem, workspace, stream);
  }
}

}  // namespace

const char* bce_cuda(const Problem& problem, double* workspace, CUstream_st* stream) {
  if (problem.rows() == 0 || (problem.columns() == 0 && !problem.reduce)) return nullptr;
  const cudaError_t error = launch_for(problem, workspace, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace jax_bce
