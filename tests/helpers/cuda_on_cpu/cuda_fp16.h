// What this project's kernels use of NVIDIA's header of this name, for the host compiler.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  memcpy(&value, &x, 2);
  return value;
}

// To nearest, ties to even.
inline __half __float2half_rn(float value) {
  const _Float16 rounded = (_Float16)value;
  __half x;
  memcpy(&x, &rounded, 2);
  return x;
}
