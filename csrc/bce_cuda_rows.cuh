// The sums of rows, in the order defined in bce_problem.h: of the losses that a tile left in shared
// memory, and of groups.
#pragma once

#include "bce_cuda_loop.cuh"

namespace jax_bce {
namespace {

constexpr int kFinishingWarps = kGroupsInBlock, kFinishingThreads = kFinishingWarps * kWarp;

// Rows of up to a group are evaluated in tiles, of so many elements at most and so many rows.
constexpr int kTileRows = 1024;
template <class Scalar>
constexpr int kTile = 16384 / sizeof(Scalar);
template <class Scalar>
constexpr int kPairs = kTile<Scalar> + kTile<Scalar> / 32 * 2;
template <class Scalar>
constexpr int kTileBytes = kPairs<Scalar> * sizeof(Pair<Scalar>);

// Folds the numbers of `width` threads by halves. Valid in the first one.
__device__ double fold(double number, int width = kWarp) {
  BCE_UNROLL
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const double other = __shfl_down_sync(0xffffffff, number, half);
    if (half < width) number += other;
  }
  return number;
}

template <class Scalar>
__device__ void finish_row(const Plan& plan, int64_t row, const Factor<Scalar>& factor,
                           double sum) {
  const double loss = factor.times(sum);
  if (plan.loss.type == Type::kF64)
    static_cast<double*>(plan.loss.data)[row] = loss;
  else
    static_cast<float*>(plan.loss.data)[row] = static_cast<float>(loss);
}

// What thread `thread` of a group adds up of a row in a tile. A thread of a tile stands for one of
// a group, or, in short rows, for all.
template <class Scalar>
__device__ double sum_of_thread(const Pair<Scalar>* pairs, int begin, int columns, int thread) {
  double high[kQuad] = {};
  Scalar low[kQuad] = {};
  const int first = thread / 8 * 256 + thread % 8 * kQuad;
  for (int k = 0; k < 8 && first + 32 * k < columns; ++k) {
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      const int column = first + 32 * k + c;
      if (column >= columns) continue;
      const Pair<Scalar> pair = pairs[spread(begin + column)];
      high[c] += pair.high;
      low[c] += pair.low;
    }
  }
  BCE_UNROLL
  for (int c = 0; c < kQuad; ++c) high[c] += low[c];
  return (high[0] + high[2]) + (high[1] + high[3]);
}

// Rows of up to 32 columns: a thread adds up a row.
template <class Scalar>
__device__ double sum_of_short_row(const Pair<Scalar>* pairs, int begin, int columns) {
  double sums[8];
  BCE_UNROLL
  for (int quad = 0; quad < 8; ++quad) {
    sums[quad] = 0;
    if (quad * kQuad >= columns) continue;
    double lanes[kQuad] = {};
    BCE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      const int column = quad * kQuad + c;
      if (column >= columns) continue;
      const Pair<Scalar> pair = pairs[spread(begin + column)];
      lanes[c] = static_cast<double>(pair.high) + static_cast<double>(pair.low);
    }
    sums[quad] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// `factor` is that of all rows, or each row has its own.
template <class Scalar>
__device__ void sum_rows(const Plan& plan, int64_t first, int rows, const Factor<Scalar>& factor) {
  const Pair<Scalar>* pairs = tile<Scalar>();
  const int columns = static_cast<int>(plan.columns);
  // The threads of a group that have elements: the others would add zeros.
  const int width = columns <= 32 ? 1 : columns <= 256 ? 8 : columns <= 512 ? 16 : 32;
  const int thread = threadIdx.x % width, rows_at_once = kThreads / width;
  for (int begin = 0; begin < rows; begin += rows_at_once) {
    const int row = begin + threadIdx.x / width;
    double sum = 0;
    if (width == 1) {
      if (row < rows) sum = sum_of_short_row(pairs, row * columns, columns);
    } else {
      sum = fold(row < rows ? sum_of_thread(pairs, row * columns, columns, thread) : 0, width);
    }
    if (row >= rows || thread != 0) continue;
    if (plan.factors == Factors::kOne)
      finish_row(plan, first + row, factor, sum);
    else
      finish_row(plan, first + row,
                 plan.factor_at<Scalar>((first + row) * (columns > 0 ? columns : 1)), sum);
  }
}

// The sum of the warps' numbers. Valid in the first thread of the thread block.
__device__ double sum_of_warps(double number) {
  double* numbers = reinterpret_cast<double*>(shared_memory);
  number = fold(number);
  if (threadIdx.x % kWarp == 0) numbers[threadIdx.x / kWarp] = number;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kFinishingWarps; ++warp) sum += numbers[warp];
  __syncthreads();  // before the next row overwrites the numbers
  return sum;
}

// Waits for all threads of a cluster; of a thread block, where GPUs know no clusters. What others
// have written before is there then.
__device__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#elif defined(__CUDACC__)
  __syncthreads();
#else
  BCE_SYNC_CLUSTER_ON_HOST();
#endif
}

// Lets the next launch begin once all thread blocks have begun, if that launch may be early; and
// waits, in the next launch, until all results of this one are there.
__device__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The sum of a block's groups; 0 behind the last block.
__device__ double sum_of_block(const Plan& plan, int64_t row, int64_t block) {
  const int64_t first = block * kGroupsInBlock, left = plan.groups_in_row - first;
  const double* sums = plan.sums + row * plan.groups_in_row + first;
  double sum = 0;
  BCE_UNROLL
  for (int group = 0; group < kGroupsInBlock; ++group)
    if (group < left) sum += sums[group];
  return sum;
}

// Adds up the groups of each row: their blocks, and these by as many threads as have one.
template <class Scalar>
__global__ void __launch_bounds__(kFinishingThreads)
    finish_rows(const __grid_constant__ Plan plan) {
  wait_for_previous();
  const int64_t blocks = (plan.groups_in_row + kGroupsInBlock - 1) / kGroupsInBlock;
  const int width = blocks == 1 ? 1 : blocks <= kWarp ? kWarp : kFinishingThreads;
  const int64_t rows_at_once = kFinishingThreads / width;
  for (int64_t begin = blockIdx.x * rows_at_once; begin < plan.rows;
       begin += gridDim.x * rows_at_once) {
    const int64_t row = begin + threadIdx.x / width;
    double sum = 0;
    if (row < plan.rows) {
#pragma unroll 4
      for (int64_t block = threadIdx.x % width; block < blocks; block += width)
        sum += sum_of_block(plan, row, block);
    }
    if (width == kWarp) sum = fold(sum);
    if (width > kWarp) sum = sum_of_warps(sum);
    if (row < plan.rows && threadIdx.x % width == 0)
      finish_row(plan, row, plan.factor_at<Scalar>(row * plan.columns), sum);
  }
}

}  // namespace
}  // namespace jax_bce
