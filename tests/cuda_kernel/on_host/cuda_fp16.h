#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
inline float __half2float(__half value) { return value.value; }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline __half __ushort_as_half(unsigned short bits) { return cast_bits<__half>(bits); }

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
