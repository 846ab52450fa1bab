// The formulas for one element at a time, compiled by two compilers: nvcc, to see that they are
// CUDA as they stand, and the host's, to see that a scalar lane gives the bits of the SIMD kernel.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../csrc/bce_math.h"

template <class T, class Unsigned>
struct ScalarLane {
  using Scalar = T;
  using Float = T;
  using Bits = Unsigned;
  static BCE_INLINE T set(T value) { return value; }
  static BCE_INLINE T select(bool mask, T yes, T no) { return mask ? yes : no; }
  static BCE_INLINE T min(T a, T b) { return a < b ? a : b; }
  static BCE_INLINE T max(T a, T b) { return a > b ? a : b; }
  static BCE_INLINE T fma(T a, T b, T c) { return ::fma(a, b, c); }
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

template <class T, class Unsigned>
BCE_INLINE void evaluate(const T* logits, const T* labels, T* loss, T* gradient, int64_t i) {
  using namespace jax_bce;
  using Lane = ScalarLane<T, Unsigned>;
  const auto exponential = exp_of<Lane>(logits[i]);
  const Pair<T> l = loss_of<Lane>(logits[i], labels[i], exponential);
  const Pair<T> g = gradient_of<Lane>(logits[i], labels[i], exponential);
  loss[i] = fast_two_sum(l.high, l.low).high;
  gradient[i] = fast_two_sum(g.high, g.low).high;
}

#ifdef __CUDACC__
#define EVALUATE(name, T, Unsigned)                                                         \
  __global__ void name(const T* logits, const T* labels, T* loss, T* gradient, int64_t n) { \
    const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;                       \
    if (i < n) evaluate<T, Unsigned>(logits, labels, loss, gradient, i);                    \
  }
#else
#define EVALUATE(name, T, Unsigned)                                                           \
  extern "C" void name(const T* logits, const T* labels, T* loss, T* gradient, int64_t n) {   \
    for (int64_t i = 0; i < n; ++i) evaluate<T, Unsigned>(logits, labels, loss, gradient, i); \
  }
#endif

EVALUATE(evaluate_float32, float, uint32_t)
EVALUATE(evaluate_float64, double, uint64_t)
