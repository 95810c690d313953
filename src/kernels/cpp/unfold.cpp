// A convolution's windows.

#include "common.h"

namespace {

// The windows of a k x k convolution as rows of a matrix, and the gradient.
struct Windows {
  int64_t batch, tokens, height, width, channels, size, stride, padding, rows, columns;

  // sizes: k, stride, padding + 1
  Windows(const int64_t* shape, const int64_t* sizes, const int64_t* grid)
      : batch(shape[0]), tokens(shape[1]), height(grid[0]), width(grid[1]), channels(shape[2]),
        size(sizes[0]), stride(sizes[1]), padding(sizes[2] - 1),
        rows((height + 2 * padding - size) / stride + 1),
        columns((width + 2 * padding - size) / stride + 1) {}

  // Whether x [B, H W, C], the sizes and the grid belong together.
  static bool fit(const int* ndims, int64_t** s, int x, int sizes, int grid) {
    if (ndims[x] != 3 || ndims[sizes] != 3 || ndims[grid] != 2) return false;
    const int64_t size = s[sizes][0], margins = 2 * (s[sizes][2] - 1);
    return size > 0 && s[sizes][1] > 0 && margins >= 0 && s[grid][0] + margins >= size &&
           s[grid][1] + margins >= size && s[x][1] == s[grid][0] * s[grid][1];
  }

  int64_t from_row(int64_t y, int64_t k) const { return y * stride + k - padding; }

  // The columns of a window that lie inside: the first, and how many.
  void span(int64_t x, int64_t* first, int64_t* count) const {
    const int64_t left = x * stride - padding;
    *first = std::max<int64_t>(0, -left);
    *count = std::max<int64_t>(0, std::min(size, width - left) - *first);
  }
};

}  // namespace

// x [B, H W, C], sizes, grid -> [B N, k k C]
AOT(unfold) {
  REQUIRE(params == 4 && Windows::fit(ndims, s, 0, 1, 2));
  const Windows w(s[0], s[1], s[2]);
  const int64_t n = w.channels, run = w.size * n, length = w.size * run;
  SHAPED(3, w.batch * w.rows * w.columns, length);
  In x = in(p, 0);
  Out y = out(p, 3);
  parallel(w.batch * w.rows, w.columns * length, [&](int64_t i) {
    In image = x + i / w.rows * w.tokens * n;
    Out row = y + i * w.columns * length;
    std::fill(row, row + w.columns * length, 0.0f);
    for (int64_t u = 0; u < w.columns; ++u) {
      int64_t first, count;
      w.span(u, &first, &count);
      for (int64_t k = 0; k < w.size; ++k) {
        const int64_t v = w.from_row(i % w.rows, k);
        if (v < 0 || v >= w.height) continue;
        In from = image + (v * w.width + u * w.stride - w.padding + first) * n;
        std::copy(from, from + count * n, row + u * length + k * run + first * n);
      }
    }
  });
  return 0;
}

// dy [B N, k k C], sizes, grid, x -> dx [B, H W, C]
AOT(unfold_grad) {
  REQUIRE(params == 5 && Windows::fit(ndims, s, 3, 1, 2));
  const Windows w(s[3], s[1], s[2]);
  const int64_t n = w.channels, run = w.size * n, length = w.size * run;
  SHAPED(0, w.batch * w.rows * w.columns, length);
  SHAPED(4, w.batch, w.tokens, n);
  In dy = in(p, 0);
  Out dx = out(p, 4);
  parallel(w.batch, w.rows * w.columns * length, [&](int64_t b) {
    Out image = dx + b * w.tokens * n;
    std::fill(image, image + w.tokens * n, 0.0f);
    for (int64_t i = 0; i < w.rows * w.columns; ++i) {
      int64_t first, count;
      w.span(i % w.columns, &first, &count);
      for (int64_t k = 0; k < w.size; ++k) {
        const int64_t v = w.from_row(i / w.columns, k);
        if (v < 0 || v >= w.height) continue;
        In from = dy + (b * w.rows * w.columns + i) * length + k * run + first * n;
        Out to = image + (v * w.width + i % w.columns * w.stride - w.padding + first) * n;
        SIMD for (int64_t c = 0; c < count * n; ++c) to[c] += from[c];
      }
    }
  });
  return 0;
}
