// Softmax of the rows of a matrix, and its gradient, in place.

#pragma once

#include "product.h"

// Queries at a time: fewer if there are so many keys that the scores would not stay in the cache.
inline int64_t queries_of(int64_t queries, int64_t keys) {
  return std::min(queries, std::clamp<int64_t>((int64_t{1} << 16) / padded(keys), kRows, kTile));
}

// The first n columns; the padding becomes next to zero.
inline void softmax(Rows scores, int64_t rows, int64_t n) {
  const int64_t wide = scores.width;
  for (int64_t r = 0; r < rows; ++r) {
    Out a = scores[r];
    for (int64_t t = n; t < wide; ++t) a[t] = -INFINITY;
    float top = a[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < wide; ++t) top = a[t] > top ? a[t] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < wide; ++t) {
      a[t] = exponential(a[t] - top);
      sum += a[t];
    }
    const float share = 1.0f / sum;
    SIMD for (int64_t t = 0; t < wide; ++t) a[t] *= share;
  }
}

// Turns gradients of the weights into those of the scores.
inline void softmax_gradient(Rows weights, int64_t rows, Rows grads) {
  const int64_t wide = weights.width;
  for (int64_t r = 0; r < rows; ++r) {
    In a = weights[r];
    Out d = grads[r];
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t t = 0; t < wide; ++t) dot += a[t] * d[t];
    SIMD for (int64_t t = 0; t < wide; ++t) d[t] = a[t] * (d[t] - dot);
  }
}
