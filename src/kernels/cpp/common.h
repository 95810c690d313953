// Operators of CvT for CPUs, forward and backward, on tokens [B, T, C]: class token first where
// there is one (T = cls + H W), then the grid row by row, channels innermost. All float32.
//
// Called by MindSpore's ops.Custom (func_type "aot"): inputs, then outputs, with their shapes; 0 is
// success; shapes that do not belong together give 1, which MindSpore turns into an error. Integers,
// like the grid H x W, arrive as the shape of a tensor. Every sum has a fixed order, whatever the
// number of threads: partial sums by image or by block of rows, added up in double, in turn.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "threads.h"

#define AOT(name)                                                                              \
  extern "C" int name(int params, void** p, int* ndims, int64_t** s, const char**, void*, void*)
#define SIMD _Pragma("omp simd")
#define REQUIRE(condition) do { if (!(condition)) return 1; } while (false)
#define SHAPED(i, ...) REQUIRE(has_shape(s[i], ndims[i], {__VA_ARGS__}))
#define VECTOR(i, n) REQUIRE(count(s[i], ndims[i]) == (n))

using In = const float* __restrict;
using Out = float* __restrict;

const int64_t kBlock = 256;  // rows of a partial sum

inline In in(void** p, int i) { return static_cast<const float*>(p[i]); }
inline Out out(void** p, int i) { return static_cast<float*>(p[i]); }

inline int64_t count(const int64_t* shape, int ndim) {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

inline bool has_shape(const int64_t* shape, int ndim, std::initializer_list<int64_t> wanted) {
  return ndim == static_cast<int>(wanted.size()) && std::equal(wanted.begin(), wanted.end(), shape);
}

// Add up partial sums [n, c].
inline void total(In partial, int64_t n, int64_t c, Out sum) {
  std::vector<double> t(c, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) t[j] += partial[i * c + j];
  for (int64_t j = 0; j < c; ++j) sum[j] = static_cast<float>(t[j]);
}

// e^x to 1 ulp or two (Cephes expf) for x within +-80, and held beyond: far from denormal numbers,
// each of which costs a hundred cycles, here and in 1 / (1 + e^x). The compiler makes vectors of it.
inline float exponential(float x) {
  x = x < -80.0f ? -80.0f : x > 80.0f ? 80.0f : x;
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}
