// A linear layer's bias together with what follows: activation, heads, residual.

#include "common.h"

namespace {

struct QuickGelu {  // x sigmoid(1.702 x)
  static float share(float x) { return 1.0f / (1.0f + exponential(-1.702f * x)); }
  static float value(float x) { return x * share(x); }
  static float slope(float x) {
    const float s = share(x);
    return s * (1.0f + 1.702f * x * (1.0f - s));
  }
};

struct Gelu {  // x P(X < x), P the normal distribution, by erf's formula 7.1.26 of Abramowitz & Stegun
  static float below(float x) {
    const float a = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a);
    float y = 1.061405429f;
    y = y * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    const float tail = 0.5f * y * t * exponential(-a * a);
    return x < 0.0f ? tail : 1.0f - tail;
  }
  static float value(float x) { return x * below(x); }
  static float slope(float x) { return below(x) + x * 0.39894228f * exponential(-0.5f * x * x); }
};

// x [M, C], bias [C] -> activation(x + bias)
template <typename Activation>
int bias_activation(int params, void** p, int* ndims, int64_t** s) {
  REQUIRE(params == 3 && ndims[0] == 2);
  const int64_t rows = s[0][0], n = s[0][1];
  VECTOR(1, n);
  SHAPED(2, rows, n);
  In x = in(p, 0), bias = in(p, 1);
  Out y = out(p, 2);
  parallel(rows, 4 * n, [&](int64_t r) {
    SIMD for (int64_t c = 0; c < n; ++c)
      y[r * n + c] = Activation::value(x[r * n + c] + bias[c]);
  });
  return 0;
}

// dy, x [M, C], bias [C] -> dx, dbias
template <typename Activation>
int bias_activation_grad(int params, void** p, int* ndims, int64_t** s) {
  REQUIRE(params == 5 && ndims[0] == 2);
  const int64_t rows = s[0][0], n = s[0][1], blocks = (rows + kBlock - 1) / kBlock;
  SHAPED(1, rows, n);
  VECTOR(2, n);
  SHAPED(3, rows, n);
  VECTOR(4, n);
  In dy = in(p, 0), x = in(p, 1), bias = in(p, 2);
  Out dx = out(p, 3);
  std::vector<float> partial(blocks * n, 0.0f);
  parallel(blocks, 4 * kBlock * n, [&](int64_t k) {
    Out sum = &partial[k * n];
    for (int64_t r = k * kBlock; r < std::min(rows, (k + 1) * kBlock); ++r)
      SIMD for (int64_t c = 0; c < n; ++c) {
        const float d = dy[r * n + c] * Activation::slope(x[r * n + c] + bias[c]);
        dx[r * n + c] = d;
        sum[c] += d;
      }
  });
  total(partial.data(), blocks, n, out(p, 4));
  return 0;
}

}  // namespace

AOT(bias_quick_gelu) { return bias_activation<QuickGelu>(params, p, ndims, s); }
AOT(bias_quick_gelu_grad) { return bias_activation_grad<QuickGelu>(params, p, ndims, s); }
AOT(bias_gelu) { return bias_activation<Gelu>(params, p, ndims, s); }
AOT(bias_gelu_grad) { return bias_activation_grad<Gelu>(params, p, ndims, s); }

// x [B, T, h d], bias [h d], h -> x + bias as heads [B, h, T, d]
AOT(split_heads) {
  REQUIRE(params == 4 && ndims[2] == 1 && ndims[3] == 4);
  const int64_t batch = s[3][0], heads = s[3][1], tokens = s[3][2], d = s[3][3];
  SHAPED(0, batch, tokens, heads * d);
  VECTOR(1, heads * d);
  SHAPED(2, heads);
  In x = in(p, 0), bias = in(p, 1);
  Out y = out(p, 3);
  parallel(batch * heads, tokens * d, [&](int64_t i) {
    In from = x + i / heads * tokens * heads * d + i % heads * d, b = bias + i % heads * d;
    Out to = y + i * tokens * d;
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < d; ++c) to[t * d + c] = from[t * heads * d + c] + b[c];
  });
  return 0;
}

// x [B, h, T, d], h -> tokens [B, T, h d], sums over them [h d]
AOT(merge_heads) {
  REQUIRE(params == 4 && ndims[0] == 4);
  const int64_t batch = s[0][0], heads = s[0][1], tokens = s[0][2], d = s[0][3], n = heads * d;
  SHAPED(1, heads);
  SHAPED(2, batch, tokens, n);
  VECTOR(3, n);
  In x = in(p, 0);
  Out y = out(p, 2);
  std::vector<float> partial(batch * n, 0.0f);
  parallel(batch * heads, tokens * d, [&](int64_t i) {
    In from = x + i * tokens * d;
    Out to = y + i / heads * tokens * n + i % heads * d, sum = &partial[i * d];
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < d; ++c) {
        to[t * n + c] = from[t * d + c];
        sum[c] += from[t * d + c];
      }
  });
  total(partial.data(), batch, n, out(p, 3));
  return 0;
}

// x, z [B, T, C], bias [C], keep [B] -> x + keep (z + bias)
AOT(bias_residual) {
  REQUIRE(params == 5 && ndims[0] == 3);
  const int64_t batch = s[0][0], tokens = s[0][1], n = s[0][2];
  SHAPED(1, batch, tokens, n);
  VECTOR(2, n);
  VECTOR(3, batch);
  SHAPED(4, batch, tokens, n);
  In x = in(p, 0), z = in(p, 1), bias = in(p, 2), keep = in(p, 3);
  Out y = out(p, 4);
  parallel(batch * tokens, n, [&](int64_t r) {
    const float k = keep[r / tokens];
    SIMD for (int64_t c = 0; c < n; ++c) y[r * n + c] = x[r * n + c] + k * (z[r * n + c] + bias[c]);
  });
  return 0;
}

// dy [B, T, C], keep [B] -> dz, dbias
AOT(bias_residual_grad) {
  REQUIRE(params == 4 && ndims[0] == 3);
  const int64_t tokens = s[0][1], n = s[0][2], rows = s[0][0] * tokens;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  VECTOR(1, s[0][0]);
  SHAPED(2, s[0][0], tokens, n);
  VECTOR(3, n);
  In dy = in(p, 0), keep = in(p, 1);
  Out dz = out(p, 2);
  std::vector<float> partial(blocks * n, 0.0f);
  parallel(blocks, kBlock * n, [&](int64_t k) {
    Out sum = &partial[k * n];
    for (int64_t r = k * kBlock; r < std::min(rows, (k + 1) * kBlock); ++r) {
      const float factor = keep[r / tokens];
      SIMD for (int64_t c = 0; c < n; ++c) {
        const float d = factor * dy[r * n + c];
        dz[r * n + c] = d;
        sum[c] += d;
      }
    }
  });
  total(partial.data(), blocks, n, out(p, 3));
  return 0;
}
