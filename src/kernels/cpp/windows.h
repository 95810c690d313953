// A convolution's windows.

#pragma once

#include "common.h"

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
    return count(s[x], 3) > 0 && size > 0 && s[sizes][1] > 0 && margins >= 0 &&
           s[grid][0] + margins >= size &&
           s[grid][1] + margins >= size && s[x][1] == s[grid][0] * s[grid][1];
  }

  int64_t number() const { return rows * columns; }
  int64_t length() const { return size * size * channels; }

  // run(place in the image, place in the window, floats) for the rows of window i that lie inside.
  template <typename Run>
  void for_rows(int64_t i, const Run& run) const {
    const int64_t top = i / columns * stride - padding, left = i % columns * stride - padding;
    const int64_t first = std::max<int64_t>(0, -left), last = std::min(size, width - left);
    if (first >= last) return;
    for (int64_t k = 0; k < size; ++k)
      if (top + k >= 0 && top + k < height)
        run(((top + k) * width + left + first) * channels, (k * size + first) * channels,
            (last - first) * channels);
  }

  // Window i of an image: rows, columns and channels behind each other, zeros beyond the border.
  void gather(In image, int64_t i, float* window) const {
    std::fill_n(window, length(), 0.0f);
    for_rows(i, [=](int64_t from, int64_t to, int64_t n) {
      std::copy_n(image + from, n, window + to);
    });
  }

  // Add a window to the image.
  void scatter(In window, int64_t i, float* image) const {
    for_rows(i, [=](int64_t to, int64_t from, int64_t n) {
      Out sum = image + to;
      In value = window + from;
      SIMD for (int64_t c = 0; c < n; ++c) sum[c] += value[c];
    });
  }
};
