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
#include <memory>
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

// A vector of floats, as wide as the processor's registers.
#if defined(__AVX512F__)
const int kLanes = 16;
#elif defined(__AVX__)
const int kLanes = 8;
#else
const int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Up to kLanes floats, the first n of them in memory.
inline Vector load(const float* from, int64_t n = kLanes) {
  Vector v{};
  if (n >= kLanes) return *reinterpret_cast<const Vector*>(from);
  std::memcpy(&v, from, 4 * n);
  return v;
}

inline void store(Vector v, float* to, int64_t n = kLanes) {
  if (n >= kLanes)
    *reinterpret_cast<Vector*>(to) = v;
  else
    std::memcpy(to, &v, 4 * n);
}

// Floats of undefined value, aligned to vectors. A vector<float> would be filled with zeros.
class Memory {
 public:
  explicit Memory(int64_t floats) : own_(new float[floats + kLanes]), start_(own_.get()) {
    start_ += (kLanes - reinterpret_cast<uintptr_t>(start_) / 4 % kLanes) % kLanes;
  }
  float* start() const { return start_; }

 private:
  std::unique_ptr<float[]> own_;
  float* start_;
};

// Memory of a thread for one turn of a loop.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    static thread_local Memory memory(0);
    static thread_local int64_t size = 0;
    if (size < floats) memory = Memory(size = floats);
    next_ = memory.start();
  }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  float* next_;
};

// The mean and 1 / deviation of a row.
inline void row_statistics(In a, int64_t n, float eps, float* mean, float* inverse) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += a[c];
  const float m = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < n; ++c) squares += (a[c] - m) * (a[c] - m);
  *mean = m;
  *inverse = 1.0f / std::sqrt(squares / n + eps);
}

// LayerNorm of a row.
inline void normalise_row(In a, In gamma, In beta, int64_t n, float eps, Out y, float* mean,
                          float* inverse) {
  row_statistics(a, n, eps, mean, inverse);
  const float m = *mean, i = *inverse;
  SIMD for (int64_t c = 0; c < n; ++c) y[c] = (a[c] - m) * i * gamma[c] + beta[c];
}

// LayerNorm's gradient at a row a with mean m and 1 / deviation i: d = extra + its gradient by dy,
// and what is added to the gradients of gamma and beta.
inline void row_gradient(In a, In dy, In gamma, int64_t n, float m, float i, In extra, Out d,
                         Out of_gamma, Out of_beta) {
  float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t c = 0; c < n; ++c) {
    const float scaled = dy[c] * gamma[c];
    sum += scaled;
    dot += scaled * ((a[c] - m) * i);
  }
  sum /= n;
  dot /= n;
  SIMD for (int64_t c = 0; c < n; ++c) {
    const float hat = (a[c] - m) * i;
    of_gamma[c] += dy[c] * hat;
    of_beta[c] += dy[c];
    d[c] = extra[c] + (dy[c] * gamma[c] - sum - hat * dot) * i;
  }
}

// Add up partial sums [n, c].
inline void total(In partial, int64_t n, int64_t c, Out sum) {
  const int64_t step = 256;  // columns
  parallel((c + step - 1) / step, n * step, [=](int64_t k) {
    double t[step] = {};
    const int64_t first = k * step, here = std::min(step, c - first);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < here; ++j) t[j] += partial[i * c + first + j];
    for (int64_t j = 0; j < here; ++j) sum[first + j] = static_cast<float>(t[j]);
  });
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
