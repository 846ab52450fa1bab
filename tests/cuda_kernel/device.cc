// What only a GPU can show of bce_cuda.cu: two streams at once, capture into CUDA graphs, and sizes
// beyond 2^31. That the results are right is test.cc's matter; here they have the bits of a plain
// call, or those of a shorter one.
//
//     device [streams] [capture] [large]     all three where none is named
#include <string>

#include "call.h"

namespace {

using namespace jax_bce;

enum class Outcome { kRight, kWrong, kNoRoom };
constexpr const char* kOutcomes[] = {"right", "WRONG", "not run, as the GPU's memory is too small"};

using Bits = std::vector<char>;

struct Results {
  Bits loss, gradient;
  explicit Results(const Call& call)
      : loss(call.loss.download()), gradient(call.gradient.download()) {}
  bool operator==(const Results& other) const {
    return loss == other.loss && gradient == other.gradient;
  }
};

// Of one plain call. The stream is created blocking: copies and fills, on the default stream, wait
// for it and it for them.
Results alone(const Call& call, cudaStream_t stream) {
  call.poison();
  call.enqueue(stream);
  must(cudaStreamSynchronize(stream));
  return Results(call);
}

constexpr Case kLongRow = {Type::kBF16, Type::kU8, 1,     3'000'001, 1,     true,
                           true,        true,      false, false,     false, false};
constexpr Case kOneLaunch = {Type::kF32, Type::kU8, 2,     20'000, 0,     true,
                             true,       true,      false, false,  false, false};
constexpr Case kManyRows = {Type::kF32, Type::kF32, 300,   20'000, 0,     true,
                            true,       true,       false, false,  false, false};

Outcome streams() {
  const Call first(kLongRow), second(kManyRows);
  cudaStream_t one, other;
  must(cudaStreamCreate(&one));
  must(cudaStreamCreate(&other));
  const Results of_first = alone(first, one), of_second = alone(second, other);
  bool same = true;
  for (int round = 0; round < 50; ++round) {
    first.poison(), second.poison();
    for (int i = 0; i < 4; ++i) first.enqueue(one), second.enqueue(other);
    must(cudaStreamSynchronize(one));
    must(cudaStreamSynchronize(other));
    same &= Results(first) == of_first && Results(second) == of_second;
  }
  must(cudaStreamDestroy(one));
  must(cudaStreamDestroy(other));
  return same ? Outcome::kRight : Outcome::kWrong;
}

cudaGraph_t captured(const Call& call, cudaStream_t stream) {
  cudaGraph_t graph;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  call.enqueue(stream);
  must(cudaStreamEndCapture(stream, &graph));
  return graph;
}

bool replayed(cudaGraphExec_t executable, const Call& call, const Results& expected,
              cudaStream_t stream) {
  call.poison();
  must(cudaGraphLaunch(executable, stream));
  must(cudaStreamSynchronize(stream));
  return Results(call) == expected;
}

// Launched twice; then captured again with other pointers, as XLA does when its buffers move.
Outcome capture() {
  bool same = true;
  for (const Case& c : {kLongRow, kOneLaunch, kManyRows}) {
    cudaStream_t stream;
    must(cudaStreamCreate(&stream));
    const Call call(c), moved(c);
    // First, while CUDA has not loaded the kernels.
    const cudaGraph_t graph = captured(call, stream), graph_when_moved = captured(moved, stream);
    const Results expected = alone(call, stream), expected_when_moved = alone(moved, stream);
    cudaGraphExec_t executable;
    must(cudaGraphInstantiate(&executable, graph, 0));
    for (int launch = 0; launch < 2; ++launch) same &= replayed(executable, call, expected, stream);
    cudaGraphExecUpdateResultInfo update;
    must(cudaGraphExecUpdate(executable, graph_when_moved, &update));
    same &= replayed(executable, moved, expected_when_moved, stream);
    must(cudaGraphExecDestroy(executable));
    must(cudaGraphDestroy(graph));
    must(cudaGraphDestroy(graph_when_moved));
    must(cudaStreamDestroy(stream));
  }
  return same ? Outcome::kRight : Outcome::kWrong;
}

constexpr int64_t kPeriod = 1 << 20;
constexpr int64_t kLarge = (int64_t{1} << 31) + kPeriod / 2 + 3;

void fill(char* device, int64_t bytes, const Array& period, int64_t period_bytes) {
  for (int64_t at = 0; at < bytes; at += period_bytes)
    must(cudaMemcpy(device + at, period.device(), std::min(period_bytes, bytes - at),
                    cudaMemcpyDeviceToDevice));
}

bool repeats(const char* device, int64_t bytes, const Bits& period) {
  Bits found(period.size());
  for (int64_t at = 0; at < bytes; at += period.size()) {
    const size_t size = std::min<int64_t>(period.size(), bytes - at);
    must(cudaMemcpy(found.data(), device + at, size, cudaMemcpyDeviceToHost));
    if (std::memcmp(found.data(), period.data(), size) != 0) return false;
  }
  return true;
}

void reshape(Problem* problem, int64_t rows, int64_t columns) {
  problem->shape[0] = rows, problem->shape[1] = columns;
  problem->logits.strides[0] = problem->labels.strides[0] = columns;
}

// From the sums that the CPU kernel has for the blocks of a period.
double mean_of_large(const Call& period) {
  const Problem problem = period.problem(&Array::host);
  const std::vector<double> sums = sums_of_blocks(problem, 0);
  double sum = 0;
  for (int64_t begin = 0; begin < kLarge; begin += kBlock)
    sum += kLarge - begin >= kBlock
               ? sums[begin % kPeriod / kBlock]
               : kBaselineKernel.loop(problem).block(problem, 0, begin % kPeriod, kLarge - begin);
  return sum / kLarge;
}

// Logits and labels repeat, so results do: as one row, then as more rows than a grid is high, then
// as many short ones.
Outcome large() {
  size_t room, total;
  must(cudaMemGetInfo(&room, &total));
  if (room < size_t{12} << 30) return Outcome::kNoRoom;
  const int64_t logits_bytes = 2 * kLarge, labels_bytes = kLarge, losses_bytes = 4 * (kLarge / 32);
  const int64_t workspace_bytes = 8 * cuda_workspace(1, kLarge);
  const DeviceMemory logits = device_memory(logits_bytes), gradient = device_memory(logits_bytes);
  const DeviceMemory labels = device_memory(labels_bytes), losses = device_memory(losses_bytes);
  const DeviceMemory workspace = device_memory(workspace_bytes);

  Call period(
      {Type::kBF16, Type::kU8, 1, kPeriod, 0, true, true, true, false, false, false, false});
  for (int64_t i = 0; i < kPeriod; ++i)
    period.logits.set(i, std::normal_distribution<double>(0, 5)(random_bits));
  period.logits.upload();
  fill(logits.get(), logits_bytes, period.logits, 2 * kPeriod);
  fill(labels.get(), labels_bytes, period.labels, kPeriod);
  const Array losses_of_period(Type::kF32, kPeriod / 32, 0);  // of its rows, where it has many

  cudaStream_t stream;
  must(cudaStreamCreate(&stream));
  bool same = true;
  for (int64_t columns : {kLarge, int64_t{2048}, int64_t{32}}) {
    const int64_t rows = kLarge / columns;
    Problem small = period.problem(&Array::device);
    small.inverse_count = 1.0 / columns;
    small.loss.data = losses_of_period.device();
    if (rows > 1) reshape(&small, kPeriod / columns, columns);
    period.poison();
    period.enqueue(small, stream);

    Problem problem = small;
    reshape(&problem, rows, columns);
    problem.logits.data = logits.get(), problem.labels.data = labels.get();
    problem.loss.data = losses.get(), problem.gradient.data = gradient.get();
    must(cudaMemset(gradient.get(), 0x5a, logits_bytes));
    must(cudaMemset(losses.get(), 0x5a, losses_bytes));
    must(cudaMemset(workspace.get(), 0x5a, workspace_bytes));
    must(bce_cuda(problem, reinterpret_cast<double*>(workspace.get()), stream));
    must(cudaStreamSynchronize(stream));

    same &= repeats(gradient.get(), 2 * rows * columns, period.gradient.download());
    if (rows > 1) {
      Bits expected = losses_of_period.download();
      expected.resize(4 * (kPeriod / columns));
      same &= repeats(losses.get(), 4 * rows, expected);
      continue;
    }
    const double expected = mean_of_large(period);
    float mean;
    must(cudaMemcpy(&mean, losses.get(), sizeof mean, cudaMemcpyDeviceToHost));
    std::printf("mean of %lld: %.9g, expected %.9g\n", static_cast<long long>(kLarge), mean,
                expected);
    same &= std::fabs(mean - expected) <= std::ldexp(expected, -23);
  }
  must(cudaStreamDestroy(stream));
  return same ? Outcome::kRight : Outcome::kWrong;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> chosen(arguments + 1, arguments + count);
  bool failed = false;
  const auto run = [&](const char* name, Outcome (*test)()) {
    if (count > 1 && std::find(chosen.begin(), chosen.end(), name) == chosen.end()) return;
    const Outcome outcome = test();
    std::printf("%s: %s\n", name, kOutcomes[static_cast<int>(outcome)]);
    failed |= outcome == Outcome::kWrong;
  };
  run("streams", streams);
  run("capture", capture);
  run("large", large);
  return failed;
}
