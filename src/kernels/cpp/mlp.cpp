// The second branch of a block of few channels: LayerNorm, Linear, activation, Linear and residual,
// a few tokens at a time. What is between x and the result exists in the cache only, and is computed
// again in the backward pass.

#include "activation.h"
#include "product.h"

namespace {

// x [B, T, C] and, behind it, LayerNorm's gamma and beta [C], weights and biases of the Linears
// [H, C], [H], [C, H], [C], keep [B] and eps [1].
struct Mlp {
  int64_t rows, tokens, n, hidden, tiles;
  In x, gamma, beta, bias1, bias2, keep;
  float eps;

  Mlp(int64_t** s, void** p, int i)
      : rows(s[i][0] * s[i][1]), tokens(s[i][1]), n(s[i][2]), hidden(s[i + 3][0]),
        tiles((rows + kTile - 1) / kTile), x(in(p, i)), gamma(in(p, i + 1)), beta(in(p, i + 2)),
        bias1(in(p, i + 4)), bias2(in(p, i + 6)), keep(in(p, i + 7)), eps(in(p, i + 8)[0]) {}

  static bool fit(const int* ndims, int64_t** s, int i) {
    if (ndims[i] != 3 || ndims[i + 3] != 2) return false;
    const int64_t n = s[i][2], hidden = s[i + 3][0];
    for (int k : {i + 1, i + 2, i + 6})
      if (count(s[k], ndims[k]) != n) return false;
    return count(s[i], 3) > 0 && has_shape(s[i + 3], 2, {hidden, n}) &&
           count(s[i + 4], ndims[i + 4]) == hidden &&
           has_shape(s[i + 5], ndims[i + 5], {n, hidden}) &&
           count(s[i + 7], ndims[i + 7]) == s[i][0] && count(s[i + 8], ndims[i + 8]) == 1;
  }

  // LayerNorm of a tile's rows, with mean and 1 / deviation of each.
  void normalise(int64_t first, int64_t number, Rows to, float* mean, float* inverse) const {
    for (int64_t r = 0; r < number; ++r)
      normalise_row(x + (first + r) * n, gamma, beta, n, eps, to[r], &mean[r], &inverse[r]);
  }
};

template <typename Activation>
int mlp(int params, void** p, int* ndims, int64_t** s) {
  REQUIRE(params == 10 && Mlp::fit(ndims, s, 0));
  const Mlp z(s, p, 0);
  SHAPED(9, s[0][0], z.tokens, z.n);
  Out result = out(p, 9);
  const Packed up(in(p, 3), z.hidden, z.n, true), down(in(p, 5), z.n, z.hidden, true);
  parallel(z.tiles, kTile * (2 * z.n + z.hidden), [&](int64_t tile) {
    Scratch scratch(kTile * (2 * padded(z.n) + padded(z.hidden)));
    const Rows normal = take(&scratch, kTile, z.n), inner = take(&scratch, kTile, z.hidden);
    const Rows outer = take(&scratch, kTile, z.n);
    const int64_t first = tile * kTile, rows = std::min(kTile, z.rows - first);
    float mean[kTile], inverse[kTile];
    z.normalise(first, rows, normal, mean, inverse);
    product(plain(normal), rows, z.n, up, inner);
    for (int64_t r = 0; r < rows; ++r) {
      Out a = inner[r];
      In bias = z.bias1;
      SIMD for (int64_t c = 0; c < z.hidden; ++c) a[c] = Activation::value(a[c] + bias[c]);
    }
    product(plain(inner), rows, z.hidden, down, outer);
    for (int64_t r = 0; r < rows; ++r) {
      const float k = z.keep[(first + r) / z.tokens];
      In a = z.x + (first + r) * z.n, b = outer[r], bias = z.bias2;
      Out y = result + (first + r) * z.n;
      SIMD for (int64_t c = 0; c < z.n; ++c) y[c] = a[c] + k * (b[c] + bias[c]);
    }
  });
  return 0;
}

// dy and the inputs -> gradients of x, gamma, beta, weight, bias, weight, bias
template <typename Activation>
int mlp_grad(int params, void** p, int* ndims, int64_t** s) {
  REQUIRE(params == 17 && Mlp::fit(ndims, s, 1));
  const Mlp z(s, p, 1);
  for (int i : {0, 10}) SHAPED(i, s[1][0], z.tokens, z.n);
  for (int i : {11, 12, 16}) VECTOR(i, z.n);
  SHAPED(13, z.hidden, z.n);
  VECTOR(14, z.hidden);
  SHAPED(15, z.n, z.hidden);
  In dy = in(p, 0);
  Out dx = out(p, 10);
  const Packed up(in(p, 4), z.hidden, z.n, true), up_rows(in(p, 4), z.hidden, z.n);
  const Packed down_rows(in(p, 6), z.n, z.hidden);
  // Of each part of the rows: the gradients of both weights, the three vectors [C], bias [H].
  const int64_t wide = padded(z.n), inner_wide = padded(z.hidden);
  const int64_t size = z.hidden * wide + z.n * inner_wide + 3 * wide + inner_wide;
  const int64_t parts = parts_of(z.tiles, size);
  const Memory memory(parts * size);
  float* partial = memory.start();
  parallel(parts, z.rows / parts * (4 * z.n + 4 * z.hidden), [&](int64_t part) {
    Scratch scratch(kTile * (3 * wide + 2 * inner_wide));
    const Rows normal = take(&scratch, kTile, z.n), inner = take(&scratch, kTile, z.hidden);
    const Rows grads = take(&scratch, kTile, z.n), of_inner = take(&scratch, kTile, z.hidden);
    const Rows of_normal = take(&scratch, kTile, z.n);
    float* mine = partial + part * size;
    std::fill_n(mine, size, 0.0f);
    const Rows of_up{mine, wide, wide};
    const Rows of_down{mine + z.hidden * wide, inner_wide, inner_wide};
    Out of_gamma = of_down[z.n], of_beta = of_gamma + wide, of_bias2 = of_beta + wide;
    Out of_bias1 = of_bias2 + wide;
    float mean[kTile], inverse[kTile];
    for (int64_t t = z.tiles * part / parts; t < z.tiles * (part + 1) / parts; ++t) {
      const int64_t first = t * kTile, rows = std::min(kTile, z.rows - first);
      z.normalise(first, rows, normal, mean, inverse);
      for (int64_t r = 0; r < rows; ++r) {
        const float k = z.keep[(first + r) / z.tokens];
        In from = dy + (first + r) * z.n;
        Out to = grads[r];
        SIMD for (int64_t c = 0; c < z.n; ++c) {
          to[c] = k * from[c];
          of_bias2[c] += to[c];
        }
      }
      product(plain(normal), rows, z.n, up, inner);
      product(plain(grads), rows, z.n, down_rows, of_inner);
      for (int64_t r = 0; r < rows; ++r) {
        Out a = inner[r], d = of_inner[r];
        In bias = z.bias1;
        SIMD for (int64_t c = 0; c < z.hidden; ++c) {
          const float value = a[c] + bias[c];
          a[c] = Activation::value(value);
          d[c] *= Activation::slope(value);
          of_bias1[c] += d[c];
        }
      }
      product(transposed(grads), z.n, rows, inner, of_down, true);
      product(transposed(of_inner), z.hidden, rows, normal, of_up, true);
      product(plain(of_inner), rows, z.hidden, up_rows, of_normal);
      for (int64_t r = 0; r < rows; ++r)
        row_gradient(z.x + (first + r) * z.n, of_normal[r], z.gamma, z.n, mean[r], inverse[r],
                     dy + (first + r) * z.n, dx + (first + r) * z.n, of_gamma, of_beta);
    }
  });
  std::vector<float> sum(size);
  total(partial, parts, size, sum.data());
  const float* next = sum.data();
  const auto give = [&](int i, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r, next += padded(columns))
      std::copy_n(next, columns, out(p, i) + r * columns);
  };
  give(13, z.hidden, z.n);
  give(15, z.n, z.hidden);
  give(11, 1, z.n);
  give(12, 1, z.n);
  give(16, 1, z.n);
  give(14, 1, z.hidden);
  return 0;
}

}  // namespace

// x [B, T, C], LayerNorm's gamma, beta [C], weight [H, C], bias [H], weight [C, H], bias [C],
// keep [B], eps [1] -> x + keep Linear(activation(Linear(LayerNorm(x))))
AOT(mlp_quick_gelu) { return mlp<QuickGelu>(params, p, ndims, s); }
AOT(mlp_quick_gelu_grad) { return mlp_grad<QuickGelu>(params, p, ndims, s); }
AOT(mlp_gelu) { return mlp<Gelu>(params, p, ndims, s); }
AOT(mlp_gelu_grad) { return mlp_grad<Gelu>(params, p, ndims, s); }
