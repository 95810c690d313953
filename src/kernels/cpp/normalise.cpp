// LayerNorm.

#include "common.h"

// x [..., C], gamma, beta, eps [1] -> y, mean [M], 1 / deviation [M]
AOT(layer_norm) {
  REQUIRE(params == 7 && ndims[0] > 0);
  const int64_t n = s[0][ndims[0] - 1];
  REQUIRE(n > 0);
  const int64_t rows = count(s[0], ndims[0]) / n;
  VECTOR(1, n);
  VECTOR(2, n);
  VECTOR(3, 1);
  VECTOR(4, rows * n);
  VECTOR(5, rows);
  VECTOR(6, rows);
  In x = in(p, 0), gamma = in(p, 1), beta = in(p, 2);
  Out y = out(p, 4), mean = out(p, 5), inverse = out(p, 6);
  const float eps = in(p, 3)[0];
  parallel(rows, 3 * n, [=](int64_t r) {
    normalise_row(x + r * n, gamma, beta, n, eps, y + r * n, &mean[r], &inverse[r]);
  });
  return 0;
}

// dy, x [..., C], gamma [C], mean, 1 / deviation [M] -> dx, dgamma, dbeta
AOT(layer_norm_grad) {
  REQUIRE(params == 8 && ndims[1] > 0);
  const int64_t n = s[1][ndims[1] - 1];
  REQUIRE(n > 0);
  const int64_t rows = count(s[1], ndims[1]) / n, blocks = (rows + kBlock - 1) / kBlock;
  for (int i : {0, 5}) VECTOR(i, rows * n);
  for (int i : {2, 6, 7}) VECTOR(i, n);
  for (int i : {3, 4}) VECTOR(i, rows);
  In dy = in(p, 0), x = in(p, 1), gamma = in(p, 2), mean = in(p, 3), inverse = in(p, 4);
  Out dx = out(p, 5);
  std::vector<float> partial(2 * blocks * n, 0.0f);
  const std::vector<float> none(n, 0.0f);
  In zeros = none.data();
  Out sums = partial.data();
  parallel(blocks, 6 * kBlock * n, [=](int64_t k) {
    Out dgamma = sums + k * n, dbeta = sums + (blocks + k) * n;
    const int64_t last = std::min(rows, (k + 1) * kBlock);
    for (int64_t r = k * kBlock; r < last; ++r)
      row_gradient(x + r * n, dy + r * n, gamma, n, mean[r], inverse[r], zeros, dx + r * n, dgamma,
                   dbeta);
  });
  total(&partial[0], blocks, n, out(p, 6));
  total(&partial[blocks * n], blocks, n, out(p, 7));
  return 0;
}
