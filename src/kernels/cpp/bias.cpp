// A linear layer's bias together with what follows: activation or residual.

#include "activation.h"

namespace {

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
