// The CUDA kernels and their launch.
//
// Elements are consecutive in the results, and so they are evaluated (bce_cuda_loop.cuh): by groups
// of 1024, each by a warp; or, if short rows are to be added up, by tiles of whole rows, each by a
// thread block. Sums of rows are in bce_cuda_rows.cuh; those of groups take a second kernel, unless
// thread blocks that can wait for each other have evaluated them all, or the caller adds them up.
//
// There is a kernel for each usual pair of dtypes, one for any other labels of each width of
// logits, and, in each arithmetic, one for modifiers and focal losses. Everything else is the same
// for all threads and is decided at run time.
#include <atomic>
#include <utility>

#include "bce_cuda.h"
#include "bce_cuda_rows.cuh"

namespace jax_bce {
namespace {

// Thread blocks per multiprocessor: as many as still keep all variables in registers.
template <class Logit, bool kModified>
constexpr int kBlocksAtOnce = sizeof(Logit) == 8 ? 2
                              : kModified        ? 3
                                                 : 4;

template <class Logit, class Label, bool kModified>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Logit, kModified>)
    evaluate(const __grid_constant__ Plan plan) {
  using Elements = Loop<Logit, Label, kModified>;
  using Scalar = typename Elements::Scalar;
  if (plan.two_launches) let_next_begin();
  Elements elements(plan);
  const int warp = threadIdx.x / kWarp;
  const bool tiles = plan.tile_rows > 0;
  Factor<Scalar>* const factors = factors_of_warps<Scalar>();
  bool first = true;
  const int step = tiles ? gridDim.x : gridDim.x * kWarps;
  for (int i = tiles ? blockIdx.x : blockIdx.x * kWarps + warp; i < plan.count; i += step) {
    int64_t row = 0, column = 0;  // of the first element
    int rows = 0;
    if (tiles) {
      row = int64_t{i} * plan.tile_rows;
      rows = static_cast<int>(plan.rows - row < plan.tile_rows ? plan.rows - row : plan.tile_rows);
      column = warp * kGroup;
    } else {
      if (plan.rows > 1) row = i / plan.groups_in_row;
      column = (i - row * plan.groups_in_row) * kGroup;
    }
    const int64_t begin = row * plan.columns + column;
    const int64_t left = (tiles ? rows * plan.columns : plan.columns) - column;
    if (first || plan.factors == Factors::kOneForRow) {
      // Where each element has its own, a tile's last warps have none.
      const Factor<Scalar> factor =
          plan.factors == Factors::kAny ? Factor<Scalar>(1, 1) : plan.factor_at<Scalar>(begin);
      elements.set_factor(factor);
      if (threadIdx.x % kWarp == 0) factors[warp] = factor;
      first = false;
    }
    const double sum =
        left > 0 ? elements.evaluate(begin, static_cast<int>(left < kGroup ? left : kGroup),
                                     warp * kGroup)
                 : 0;
    if (tiles) {
      __syncthreads();
      sum_rows(plan, row, rows, factors[0]);
      __syncthreads();  // before the next tile overwrites the losses
    } else if (plan.reduce) {
      const double total = fold(sum);
      if (threadIdx.x % kWarp == 0)
        plan.sums[i] = plan.parts > 1 ? factors[warp].times(total) : total;
    }
  }
  for (int64_t i = plan.count + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.parts;
       i += int64_t{gridDim.x} * kThreads)
    plan.sums[i] = 0;
  if (!plan.one_launch) return;
  sync_cluster();
  if (blockIdx.x > 0) return;
  for (int64_t row = warp; row < plan.rows; row += kWarps) {
    const double sum = fold(sum_of_block(plan, row, threadIdx.x % kWarp));
    if (threadIdx.x % kWarp == 0)
      finish_row(plan, row, plan.factor_at<Scalar>(row * plan.columns), sum);
  }
}

cudaLaunchConfig_t config_of(int64_t blocks, int threads, int shared_bytes, CUstream_st* stream,
                             cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr;
  return config;
}

// Of a launch whose thread blocks are a cluster.
cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return attribute;
}

// Of a launch that begins while the one before it ends, and waits for its results by itself.
cudaLaunchAttribute early() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// The largest cluster that the kernel's thread blocks can be on the device in use: a power of two,
// and 1 before compute capability 9.0, or if there is no code for it. CUDA is asked once per
// device, which is when the known-answer test launches the kernel.
constexpr int kLargestCluster = 16, kPortableCluster = 8;
template <void (*kKernel)(Plan)>
int largest_cluster(int shared_bytes) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 1;
  int size = known[device].load(std::memory_order_relaxed);
  if (size > 0) return size;
  cudaFuncAttributes code;
  const bool found = cudaFuncGetAttributes(&code, kKernel) == cudaSuccess;
  size = !found || code.ptxVersion < 90 ? 1
         : cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
                 cudaSuccess
             ? kLargestCluster
             : kPortableCluster;
  for (; size > 1; size /= 2) {
    cudaLaunchAttribute cluster = cluster_of(size);
    const auto config = config_of(size, kThreads, shared_bytes, nullptr, &cluster);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess && clusters > 0)
      break;
  }
  cudaGetLastError();  // clears a failure, which the next launch would report
  if (found) known[device].store(size, std::memory_order_relaxed);
  return size;
}

// Of the first device that is used: more or fewer on another one only divide the work less well.
int multiprocessors() {
  static const int number = [] {
    int device = 0, number = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    return known && number > 0 ? number : 128;
  }();
  return number;
}

// Enough thread blocks to fill the GPU a few times, so that it stays full while the last ones end;
// no more, as each begins with some work of its own.
int64_t grid(int64_t blocks, int blocks_at_once) {
  const int64_t most = int64_t{4} * blocks_at_once * multiprocessors();
  return blocks < most ? blocks : most;
}

template <class Logit, class Label, bool kModified = false>
cudaError_t launch_for(Plan plan, CUstream_st* stream) {
  using Scalar = ScalarOf<Logit>;
  constexpr auto kKernel = evaluate<Logit, Label, kModified>;
  constexpr int kShared = kFactorBytes<Scalar>;
  const bool tiles = plan.tile_rows > 0, sums = plan.reduce && !tiles && plan.parts == 1;
  const int blocks = tiles ? plan.count : plan.count > 0 ? (plan.count + kWarps - 1) / kWarps : 1;
  int together = 1;  // of which the last thread blocks may have no groups
  while (together < blocks && together < kLargestCluster) together *= 2;
  const int largest = sums && blocks > 1 ? largest_cluster<kKernel>(kShared) : 1;
  if (sums && blocks <= together && together <= largest) {
    plan.one_launch = true;
    cudaLaunchAttribute cluster = cluster_of(together);
    const auto config =
        config_of(together, kThreads, kShared, stream, together > 1 ? &cluster : nullptr);
    const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, plan);
    if (error == cudaSuccess || together == 1) return error;
    cudaGetLastError();
    plan.one_launch = false;  // the GPU has no room for the cluster after all
  }

  plan.two_launches = sums;
  auto config = config_of(grid(blocks, kBlocksAtOnce<Logit, kModified>), kThreads,
                          kShared + (tiles ? kTileBytes<Scalar> : 0), stream, nullptr);
  const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, plan);
  if (error != cudaSuccess || !sums) return error;
  const int64_t rows_at_once = plan.groups_in_row <= kGroupsInBlock           ? kFinishingThreads
                               : plan.groups_in_row <= kGroupsInBlock * kWarp ? kFinishingWarps
                                                                              : 1;
  // XLA makes a captured graph a part of another one, where CUDA may not allow it.
  cudaStreamCaptureStatus capture;
  cudaLaunchAttribute begins_early = early();
  const bool allowed = largest > 1 && cudaStreamIsCapturing(stream, &capture) == cudaSuccess &&
                       capture == cudaStreamCaptureStatusNone;
  if (!allowed) cudaGetLastError();
  config = config_of(grid((plan.rows + rows_at_once - 1) / rows_at_once, 8), kFinishingThreads,
                     kFinishingWarps * sizeof(double), stream, allowed ? &begins_early : nullptr);
  return cudaLaunchKernelEx(&config, finish_rows<Scalar>, plan);
}

template <class Logit>
cudaError_t launch_for(const Plan& plan, CUstream_st* stream) {
  const Type labels = plan.labels().type;
  if (width_of(labels) == 1) return launch_for<Logit, uint8_t>(plan, stream);
  if constexpr (!std::is_same_v<Logit, __half>)
    if (labels == kTypeOf<Logit>) return launch_for<Logit, Logit>(plan, stream);
  return launch_for<std::conditional_t<sizeof(Logit) == 2, uint16_t, Logit>, Any>(plan, stream);
}

// Brings an operand into as few dimensions as its strides allow.
Input input_of(const void* data, Type type, int rank, const int64_t* shape, const int64_t* strides,
               Plan* plan) {
  Input input;
  input.data = data;
  input.type = type;
  int64_t sizes[kMaxRank], steps[kMaxRank];
  int merged = 0;  // from the last dimension on
  for (int d = rank - 1; d >= 0; --d) {
    if (shape[d] == 1) continue;
    if (merged > 0 && strides[d] == steps[merged - 1] * sizes[merged - 1]) {
      sizes[merged - 1] *= shape[d];
    } else {
      sizes[merged] = shape[d];
      steps[merged++] = strides[d];
    }
  }
  input.rank = merged > 0 ? merged : 1;
  input.shape[0] = 1;
  for (int d = 0; d < merged; ++d) {
    input.shape[merged - 1 - d] = sizes[d];
    input.strides[merged - 1 - d] = steps[d];
  }
  const int64_t inner = input.shape[1];
  input.form = Form::kOther;
  if (input.rank == 1 && input.strides[0] <= 1) {
    input.form = input.strides[0] == 0 ? Form::kOne : Form::kEach;
  } else if (input.rank == 2 && input.strides[0] + input.strides[1] == 1 &&
             inner < int64_t{1} << 30 && (plan->inner == 0 || plan->inner == inner)) {
    input.form = input.strides[1] == 1 ? Form::kByColumn : Form::kByRow;
    if (plan->inner == 0) {
      int digits = 1;
      while (int64_t{1} << digits < inner) ++digits;
      plan->inner = static_cast<uint32_t>(inner);
      plan->magic = static_cast<uint32_t>(((uint64_t{1} << (31 + digits)) + inner - 1) / inner);
      plan->shift = digits - 1;
    }
  }
  return input;
}

// Whether all elements, or all of a row, share the operand's number.
Factors factors_of(const Problem& problem, const Operand& operand) {
  Factors factors = Factors::kOne;
  for (int d = 0; d < problem.rank; ++d)
    if (operand.strides[d] != 0 && problem.shape[d] != 1)
      factors = d == problem.rank - 1 ? Factors::kAny : Factors::kOneForRow;
  return factors;
}

Plan plan_for(const Problem& problem, double* sums, bool* modified) {
  Plan plan = {};
  Input* const modifiers = plan.inputs + Plan::kFirstModifier;
  const int64_t rows = problem.rows(), columns = problem.columns();
  const bool in_tiles = problem.reduce && columns <= kGroup && problem.parts == 1;
  const bool in_rows = problem.reduce && !in_tiles;
  int64_t shape[kMaxRank];
  for (int d = 0; d < problem.rank; ++d) shape[d] = problem.shape[d] > 0 ? problem.shape[d] : 1;
  for (int name = 0; name < kModifiersOfLosses; ++name) {
    const Modifier& modifier = problem.modifiers[name];
    if (modifier.data && columns > 0)
      modifiers[name] = input_of(modifier.data, modifier.type, modifier.rank, modifier.shape,
                                 modifier.strides, &plan);
  }
  const auto input = [&](const Operand& operand) {
    return input_of(operand.data, operand.type, problem.rank, shape, operand.strides, &plan);
  };
  plan.inputs[Plan::kLogits] = input(problem.logits);
  plan.inputs[Plan::kLabels] = input(problem.labels);
  plan.scale = input(problem.scale);
  // Without elements it may be empty, and must not be read.
  plan.inputs[Plan::kSmoothing] = input(columns > 0 ? problem.smoothing : problem.scale);
  plan.divisor = input(problem.divisor), plan.divisor_low = problem.divisor_low.data;
  plan.width_of_logits = width_of(problem.logits.type);
  plan.width_of_labels = width_of(problem.labels.type);
  plan.loss = problem.loss, plan.gradient = problem.gradient;
  plan.reduce = problem.reduce, plan.total = problem.total;
  plan.focal = problem.is_focal() && !problem.total;
  plan.constant_power = problem.constant_power;
  plan.losses = in_tiles ? Losses::kTile : in_rows ? Losses::kSum : Losses::kStore;
  plan.inverse_count = problem.inverse_count;
  plan.parts = problem.parts;
  plan.sums = problem.parts > 1 ? static_cast<double*>(problem.loss.data) : sums;

  Factors factors = Factors::kOne;
  for (const Operand* operand : {&problem.scale, &problem.divisor, &problem.divisor_low})
    if (const Factors own = factors_of(problem, *operand); own > factors) factors = own;
  if (factors == Factors::kOneForRow && !in_rows) factors = Factors::kAny;
  plan.factors = factors;
  plan.rows = problem.reduce ? rows : 1;
  plan.columns = problem.reduce ? columns : rows * columns;
  if (in_tiles) {
    const int64_t tile = problem.scale.type == Type::kF64 ? kTile<double> : kTile<float>;
    int64_t tile_rows = tile / (columns > 0 ? columns : 1);
    if (tile_rows > kTileRows) tile_rows = kTileRows;
    if (tile_rows > kQuad) tile_rows = tile_rows / kQuad * kQuad;  // tiles begin with whole quads
    plan.tile_rows = static_cast<int>(tile_rows);
    plan.count = static_cast<int>((rows + tile_rows - 1) / tile_rows);
  } else {
    plan.groups_in_row = (plan.columns + kGroup - 1) / kGroup;
    plan.count = static_cast<int>(plan.rows * plan.groups_in_row);
  }
  plan.dense = plan.logits().form == Form::kEach &&
               (plan.labels().form == Form::kEach || plan.labels().form == Form::kOne);
  const auto aligned = [](const void* data, Type type) {
    return !data || is_aligned(data, kQuad * width_of(type));
  };
  // Groups begin with rows.
  plan.aligned =
      (in_tiles        ? plan.tile_rows * columns
       : plan.rows > 1 ? columns
                       : 0) %
              kQuad ==
          0 &&
      aligned(plan.logits().data, plan.logits().type) &&
      (plan.labels().form == Form::kOne || aligned(plan.labels().data, plan.labels().type)) &&
      aligned(plan.gradient.data, plan.gradient.type) &&
      (plan.reduce || aligned(plan.loss.data, plan.loss.type));
  const auto fits = [&](const Result& result) {
    return !result.data || result.type == problem.logits.type;
  };
  plan.direct = plan.aligned && fits(plan.gradient) && (plan.reduce || fits(plan.loss));
  plan.common_modifiers = plan.direct && !plan.total && !plan.focal && factors != Factors::kAny &&
                          plan.smoothing().form == Form::kOne && width_of(plan.labels().type) < 8 &&
                          (plan.inner == 0 || rows * columns / plan.inner < int64_t{1} << 31);
  plan.whole_quads = plan.inner % kQuad == 0;
  // A single factor is the weight.
  if (!plan.modifier(kWeight).data) std::swap(modifiers[kWeight], modifiers[kSampleWeight]);
  for (int name = 0; name < kModifiersOfAll; ++name) {
    const Input& input = plan.modifier(name);
    if (!input.data) continue;
    plan.uses |= 1u << name;
    const bool usual = name == kIgnoreLabel ? input.form == Form::kOne && width_of(input.type) < 8
                       : name == kWhere     ? width_of(input.type) == 1
                                            : input.type == Type::kF32;
    plan.common_modifiers = plan.common_modifiers && usual && input.form != Form::kOther;
    if (input.form == Form::kEach || input.form == Form::kByColumn)
      plan.whole_quads = plan.whole_quads && aligned(input.data, input.type);
  }
  const bool usual = plan.uses == kOneWeight || plan.uses == 1u << kPosWeight ||
                     (plan.uses == kWeights && plan.modifier(kSampleWeight).form == Form::kByRow);
  if (usual && plan.logits().type == Type::kF32 && plan.whole_quads && plan.reduce &&
      plan.gradient.data)
    plan.usual_modifiers = plan.uses;
  *modified = problem.modified || problem.is_focal() || problem.total || factors == Factors::kAny ||
              plan.smoothing().form != Form::kOne || !plan.dense;
  return plan;
}

__device__ alignas(256) char scratch[kScratch];

cudaError_t launch_for(const Problem& problem, double* sums, CUstream_st* stream) {
  bool modified;
  const Plan plan = plan_for(problem, sums, &modified);
  if (modified) {
    return problem.logits.type == Type::kF64 ? launch_for<double, Any, true>(plan, stream)
                                             : launch_for<Any, Any, true>(plan, stream);
  }
  switch (problem.logits.type) {
    case Type::kF16:
      return launch_for<__half>(plan, stream);
    case Type::kBF16:
      return launch_for<__nv_bfloat16>(plan, stream);
    case Type::kF64:
      return launch_for<double, Any>(plan, stream);
    default:
      return launch_for<float>(plan, stream);
  }
}

}  // namespace

const char* bce_cuda(const Problem& problem, double* sums, CUstream_st* stream) {
  if (problem.rows() == 0 || (problem.columns() == 0 && !problem.reduce)) return nullptr;
  const cudaError_t error = launch_for(problem, sums, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_scratch(char** memory) {
  const cudaError_t error = cudaGetSymbolAddress(reinterpret_cast<void**>(memory), scratch);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_runtime_version() { return CUDART_VERSION; }

std::vector<int> cuda_compute_capabilities() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<int> capabilities;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
      capabilities.push_back(10 * major + minor);
  }
  return capabilities;
}

}  // namespace jax_bce
