// The convolutional token embedding as a matrix product over its windows: for many channels only the
// windows, for few the whole of it, convolution and LayerNorm, a few windows at a time.

#include "product.h"
#include "windows.h"

// x [B, H W, C], sizes, grid -> [B N, k k C]
AOT(unfold) {
  REQUIRE(params == 4 && Windows::fit(ndims, s, 0, 1, 2));
  const Windows w(s[0], s[1], s[2]);
  SHAPED(3, w.batch * w.number(), w.length());
  In x = in(p, 0);
  Out y = out(p, 3);
  parallel(w.batch * w.number(), w.length(), [=](int64_t i) {
    w.gather(x + i / w.number() * w.tokens * w.channels, i % w.number(), y + i * w.length());
  });
  return 0;
}

// dy [B N, k k C], sizes, grid, x -> dx [B, H W, C]
AOT(unfold_grad) {
  REQUIRE(params == 5 && Windows::fit(ndims, s, 3, 1, 2));
  const Windows w(s[3], s[1], s[2]);
  const int64_t n = w.tokens * w.channels, length = w.length();
  SHAPED(0, w.batch * w.number(), length);
  SHAPED(4, w.batch, w.tokens, w.channels);
  In dy = in(p, 0);
  Out dx = out(p, 4);
  parallel(w.batch, w.number() * length, [=](int64_t b) {
    std::fill_n(dx + b * n, n, 0.0f);
    for (int64_t i = 0; i < w.number(); ++i)
      w.scatter(dy + (b * w.number() + i) * length, i, dx + b * n);
  });
  return 0;
}

namespace {

// The weight [C', C, k, k] with its values in a window's order: [k k C, C'], or [C', k k C].
class Kernel {
 public:
  Kernel(In weight, const Windows& w, int64_t channels)
      : ordered_(weight, channels, w), across_(ordered_.start(), channels, w.length(), true),
        rows_(ordered_.start(), channels, w.length()) {}
  Right across() const { return across_; }
  Right rows() const { return rows_; }

 private:
  struct Ordered : Memory {
    Ordered(In weight, int64_t channels, const Windows& w) : Memory(channels * w.length()) {
      float* to = start();
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t k = 0; k < w.size * w.size; ++k)
          for (int64_t c = 0; c < w.channels; ++c)
            *to++ = weight[(i * w.channels + c) * w.size * w.size + k];
    }
  } ordered_;
  Packed across_, rows_;
};

// Whether the weight [C', C, k, k] and vectors [C'] belong to the windows of x.
bool fits(const int* ndims, int64_t** s, int x, int weight, std::initializer_list<int> vectors,
          int sizes, int grid) {
  if (!Windows::fit(ndims, s, x, sizes, grid) || ndims[weight] != 4) return false;
  const int64_t size = s[sizes][0];
  for (int i : vectors)
    if (count(s[i], ndims[i]) != s[weight][0]) return false;
  return has_shape(s[weight], 4, {s[weight][0], s[x][2], size, size});
}

}  // namespace

// x [B, H W, C], weight [C', C, k, k], bias, LayerNorm's gamma, beta [C'], eps [1], sizes, grid ->
// y = LayerNorm(z), z = convolution + bias [B, N, C']
AOT(conv_embed) {
  REQUIRE(params == 10 && fits(ndims, s, 0, 1, {2, 3, 4}, 6, 7));
  const Windows w(s[0], s[6], s[7]);
  const int64_t n = s[1][0], length = w.length(), number = w.batch * w.number();
  VECTOR(5, 1);
  for (int i : {8, 9}) SHAPED(i, w.batch, w.number(), n);
  In x = in(p, 0), bias = in(p, 2), gamma = in(p, 3), beta = in(p, 4);
  Out y = out(p, 8), z = out(p, 9);
  const float eps = in(p, 5)[0];
  const Kernel kernel(in(p, 1), w, n);
  parallel((number + kTile - 1) / kTile, kTile * (length + 2 * n), [&](int64_t tile) {
    const int64_t first = tile * kTile, rows = std::min(kTile, number - first);
    Scratch scratch(kTile * (padded(length) + padded(n)));
    const Rows windows = take(&scratch, kTile, length), found = take(&scratch, kTile, n);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      w.gather(x + i / w.number() * w.tokens * w.channels, i % w.number(), windows[r]);
    }
    product(plain(windows), rows, length, kernel.across(), found);
    for (int64_t r = 0; r < rows; ++r) {
      In a = found[r], offset = bias;
      Out mine = z + (first + r) * n;
      SIMD for (int64_t c = 0; c < n; ++c) mine[c] = a[c] + offset[c];
      float m, inverse;
      normalise_row(mine, gamma, beta, n, eps, y + (first + r) * n, &m, &inverse);
    }
  });
  return 0;
}

// dy, z [B, N, C'], x, weight, gamma, eps, sizes, grid ->
// dz, gradients of weight, bias, gamma, beta
AOT(conv_embed_grad) {
  REQUIRE(params == 13 && fits(ndims, s, 2, 3, {4, 10, 11, 12}, 6, 7));
  const Windows w(s[2], s[6], s[7]);
  const int64_t n = s[3][0], length = w.length(), number = w.batch * w.number();
  VECTOR(5, 1);
  for (int i : {0, 1, 8}) SHAPED(i, w.batch, w.number(), n);
  SHAPED(9, n, w.channels, w.size, w.size);
  In dy = in(p, 0), z = in(p, 1), x = in(p, 2), gamma = in(p, 4);
  Out dz = out(p, 8), dweight = out(p, 9);
  const float eps = in(p, 5)[0];
  const int64_t wide = padded(length), tiles = (number + kTile - 1) / kTile;
  const int64_t size = n * wide + 3 * padded(n);  // of a part of the windows: weight, three vectors
  const int64_t parts = parts_of(tiles, size);
  const Memory memory(parts * size);
  float* partial = memory.start();
  const std::vector<float> none(n, 0.0f);
  parallel(parts, number / parts * (2 * length + 4 * n), [&](int64_t part) {
    float* mine = partial + part * size;
    std::fill_n(mine, size, 0.0f);
    const Rows of_weight{mine, wide, wide};
    Out of_bias = of_weight[n], of_gamma = of_bias + padded(n), of_beta = of_gamma + padded(n);
    Scratch scratch(kTile * (wide + padded(n)));
    const Rows windows = take(&scratch, kTile, length), grads = take(&scratch, kTile, n);
    for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
      const int64_t first = tile * kTile, rows = std::min(kTile, number - first);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        w.gather(x + i / w.number() * w.tokens * w.channels, i % w.number(), windows[r]);
        float m, inverse;
        row_statistics(z + i * n, n, eps, &m, &inverse);
        row_gradient(z + i * n, dy + i * n, gamma, n, m, inverse, none.data(), grads[r], of_gamma,
                     of_beta);
        In a = grads[r];
        Out to = dz + i * n;
        SIMD for (int64_t c = 0; c < n; ++c) {
          to[c] = a[c];
          of_bias[c] += a[c];
        }
      }
      product(transposed(grads), n, rows, windows, of_weight, true);
    }
  });
  std::vector<float> sum(size);
  total(partial, parts, size, sum.data());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < w.channels; ++c)
      for (int64_t k = 0; k < w.size * w.size; ++k)
        *dweight++ = sum[i * wide + k * w.channels + c];
  for (int i = 0; i < 3; ++i) std::copy_n(&sum[n * wide + i * padded(n)], n, out(p, 10 + i));
  return 0;
}

// dz [B, N, C'], x, weight, sizes, grid -> dx [B, H W, C]; not needed for the images themselves
AOT(conv_embed_grad_x) {
  REQUIRE(params == 6 && fits(ndims, s, 1, 2, {}, 3, 4));
  const Windows w(s[1], s[3], s[4]);
  const int64_t n = s[2][0], length = w.length(), number = w.number();
  SHAPED(0, w.batch, number, n);
  SHAPED(5, w.batch, w.tokens, w.channels);
  In dz = in(p, 0);
  Out dx = out(p, 5);
  const Kernel kernel(in(p, 2), w, n);
  parallel(w.batch, number * length, [&](int64_t b) {
    Out image = dx + b * w.tokens * w.channels;
    std::fill_n(image, w.tokens * w.channels, 0.0f);
    Scratch scratch(kTile * padded(length));
    const Rows windows = take(&scratch, kTile, length);
    for (int64_t first = 0; first < number; first += kTile) {
      const int64_t rows = std::min(kTile, number - first);
      product({dz + (b * number + first) * n, n, 1}, rows, n, kernel.rows(), windows);
      for (int64_t r = 0; r < rows; ++r) w.scatter(windows[r], first + r, image);
    }
  });
  return 0;
}
