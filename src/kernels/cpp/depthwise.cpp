// The depthwise convolution of the projections, alone and with BatchNorm.

#include "common.h"

namespace {

// A 3 x 3 depthwise convolution with padding 1 over a grid, and its gradient.
struct Depthwise {
  int64_t batch, channels, height, width, stride, cls, rows, columns;
  std::vector<float> kernel, zeros;  // [9, C], [C]

  Depthwise(In weight, const int64_t* shape, const int64_t* strides, const int64_t* grid)
      : batch(shape[0]), channels(shape[2]), height(grid[0]), width(grid[1]),
        stride(strides[0]), cls(shape[1] - height * width),
        rows((height - 1) / stride + 1), columns((width - 1) / stride + 1),
        kernel(9 * channels), zeros(channels) {
    for (int64_t c = 0; c < channels; ++c)
      for (int k = 0; k < 9; ++k) kernel[k * channels + c] = weight[c * 9 + k];
  }

  // Whether tensors at these places belong together: x [B, cls + H W, C], weight [C, 1, 3, 3].
  static bool fit(const int* ndims, int64_t** s, int x, int weight, int strides, int grid) {
    if (ndims[x] != 3 || ndims[strides] != 1 || ndims[grid] != 2) return false;
    const int64_t cls = s[x][1] - s[grid][0] * s[grid][1];
    return s[strides][0] > 0 && s[grid][0] > 0 && s[grid][1] > 0 && (cls == 0 || cls == 1) &&
           has_shape(s[weight], ndims[weight], {s[x][2], 1, 3, 3});
  }

  int64_t before() const { return (cls + height * width) * channels; }  // floats of an image
  int64_t after() const { return (cls + rows * columns) * channels; }

  // The nine tokens under a window, zeros where it reaches beyond the grid.
  void window(In tokens, int64_t y, int64_t x, const float** taps) const {
    for (int k = 0; k < 9; ++k) {
      const int64_t v = y * stride + k / 3 - 1, u = x * stride + k % 3 - 1;
      const bool inside = v >= 0 && v < height && u >= 0 && u < width;
      taps[k] = inside ? tokens + (v * width + u) * channels : zeros.data();
    }
  }

  // The nine outputs that a token went into.
  void windows(In grads, int64_t v, int64_t u, const float** taps) const {
    for (int k = 0; k < 9; ++k) {
      const int64_t y = v + 1 - k / 3, x = u + 1 - k % 3;
      const bool inside = y >= 0 && x >= 0 && y % stride == 0 && x % stride == 0 &&
                          y / stride < rows && x / stride < columns;
      taps[k] = inside ? grads + (y / stride * columns + x / stride) * channels : zeros.data();
    }
  }

  // result[c] = scale[c] * sum_k kernel[k, c] taps[k][c] + shift[c]
  void weigh(const float** taps, In scale, In shift, Out result) const {
    const float *a = taps[0], *b = taps[1], *d = taps[2], *e = taps[3], *f = taps[4],
                *g = taps[5], *h = taps[6], *i = taps[7], *j = taps[8], *w = kernel.data();
    const int64_t n = channels;
    SIMD for (int64_t c = 0; c < n; ++c) {
      const float top = w[c] * a[c] + w[n + c] * b[c] + w[2 * n + c] * d[c];
      const float middle = w[3 * n + c] * e[c] + w[4 * n + c] * f[c] + w[5 * n + c] * g[c];
      const float bottom = w[6 * n + c] * h[c] + w[7 * n + c] * i[c] + w[8 * n + c] * j[c];
      result[c] = (top + middle + bottom) * scale[c] + shift[c];
    }
  }

  void forward_row(In x, int64_t b, int64_t y, In scale, In shift, Out result) const {
    const float *image = x + b * before(), *taps[9];
    float* mine = result + b * after();
    if (cls && y == 0) std::copy(image, image + channels, mine);
    for (int64_t u = 0; u < columns; ++u) {
      window(image + cls * channels, y, u, taps);
      weigh(taps, scale, shift, mine + (cls + y * columns + u) * channels);
    }
  }

  // Gradients of one image's grid: of its tokens, and of the kernel, [9, C], added to.
  void backward(In tokens, In grads, Out of_tokens, Out of_kernel) const {
    const int64_t n = channels;
    const std::vector<float> one(n, 1.0f);
    const float* taps[9];
    for (int64_t v = 0; v < height; ++v)
      for (int64_t u = 0; u < width; ++u) {
        windows(grads, v, u, taps);
        weigh(taps, one.data(), zeros.data(), of_tokens + (v * width + u) * n);
      }
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; ++x) {
        window(tokens, y, x, taps);
        In g = grads + (y * columns + x) * n;
        for (int k = 0; k < 9; ++k) {
          In t = taps[k];
          Out w = of_kernel + k * n;
          SIMD for (int64_t c = 0; c < n; ++c) w[c] += t[c] * g[c];
        }
      }
  }
};

// Add up the images' gradients [B, 9, C] of the weight [C, 1, 3, 3].
void total_kernel(const std::vector<float>& kernels, const Depthwise& conv, Out dweight) {
  const int64_t n = conv.channels;
  std::vector<float> kernel(9 * n);
  total(kernels.data(), conv.batch, 9 * n, kernel.data());
  for (int64_t c = 0; c < n; ++c)
    for (int k = 0; k < 9; ++k) dweight[c * 9 + k] = kernel[k * n + c];
}

}  // namespace

// Convolution and BatchNorm of given statistics.
// x [B, T, C], weight [C, 1, 3, 3], gamma, beta, mean, variance [C], eps, stride, grid -> y
AOT(depthwise) {
  REQUIRE(params == 10 && Depthwise::fit(ndims, s, 0, 1, 7, 8));
  const Depthwise conv(in(p, 1), s[0], s[7], s[8]);
  const int64_t n = conv.channels;
  for (int i : {2, 3, 4, 5}) VECTOR(i, n);
  VECTOR(6, 1);
  SHAPED(9, conv.batch, conv.cls + conv.rows * conv.columns, n);
  In x = in(p, 0), gamma = in(p, 2), beta = in(p, 3), mean = in(p, 4), variance = in(p, 5);
  Out y = out(p, 9);
  const float eps = in(p, 6)[0];
  std::vector<float> scale(n), shift(n);
  for (int64_t c = 0; c < n; ++c) scale[c] = gamma[c] * (1.0f / std::sqrt(variance[c] + eps));
  for (int64_t c = 0; c < n; ++c) shift[c] = mean[c] * scale[c];  // stored: not fused with the sum
  for (int64_t c = 0; c < n; ++c) shift[c] = beta[c] - shift[c];
  parallel(conv.batch * conv.rows, 9 * conv.columns * n, [&](int64_t i) {
    conv.forward_row(x, i / conv.rows, i % conv.rows, scale.data(), shift.data(), y);
  });
  return 0;
}

// dy, x, weight, scale, stride, grid -> dx, dweight, dscale, dshift
AOT(depthwise_grad) {
  REQUIRE(params == 10 && Depthwise::fit(ndims, s, 1, 2, 4, 5));
  const Depthwise conv(in(p, 2), s[1], s[4], s[5]);
  const int64_t n = conv.channels, tokens = conv.rows * conv.columns, cls = conv.cls * n;
  SHAPED(0, conv.batch, conv.cls + tokens, n);
  VECTOR(3, n);
  SHAPED(6, conv.batch, s[1][1], n);
  SHAPED(7, n, 1, 3, 3);
  VECTOR(8, n);
  VECTOR(9, n);
  In dy = in(p, 0), x = in(p, 1), scale = in(p, 3);
  Out dx = out(p, 6), dweight = out(p, 7);
  const std::vector<float> one(n, 1.0f);
  std::vector<float> sums(2 * conv.batch * n, 0.0f), kernels(conv.batch * 9 * n, 0.0f);
  std::vector<float> z(conv.batch * conv.after());
  parallel(conv.batch, 30 * tokens * n, [&](int64_t b) {
    for (int64_t row = 0; row < conv.rows; ++row)
      conv.forward_row(x, b, row, one.data(), conv.zeros.data(), z.data());
    In g = dy + b * conv.after() + cls, a = &z[b * conv.after() + cls];
    Out dot = &sums[b * n], sum = &sums[(conv.batch + b) * n];
    std::vector<float> dz(tokens * n);
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c) {
        dot[c] += g[t * n + c] * a[t * n + c];
        sum[c] += g[t * n + c];
        dz[t * n + c] = g[t * n + c] * scale[c];
      }
    Out mine = dx + b * conv.before();
    std::copy(dy + b * conv.after(), dy + b * conv.after() + cls, mine);
    conv.backward(x + b * conv.before() + cls, dz.data(), mine + cls, &kernels[b * 9 * n]);
  });
  total(&sums[0], conv.batch, n, out(p, 8));
  total(&sums[conv.batch * n], conv.batch, n, out(p, 9));
  total_kernel(kernels, conv, dweight);
  return 0;
}

// Convolution and BatchNorm of a batch's own statistics.
// x [B, T, C], weight, gamma, beta, eps, stride, grid -> y, z = conv(x), mean, biased variance
AOT(conv_norm) {
  REQUIRE(params == 11 && Depthwise::fit(ndims, s, 0, 1, 5, 6));
  const Depthwise conv(in(p, 1), s[0], s[5], s[6]);
  const int64_t n = conv.channels, tokens = conv.rows * conv.columns, cls = conv.cls * n;
  VECTOR(2, n);
  VECTOR(3, n);
  VECTOR(4, 1);
  SHAPED(7, conv.batch, conv.cls + tokens, n);
  SHAPED(8, conv.batch, conv.cls + tokens, n);
  VECTOR(9, n);
  VECTOR(10, n);
  In x = in(p, 0), gamma = in(p, 2), beta = in(p, 3);
  Out y = out(p, 7), z = out(p, 8), mean = out(p, 9), variance = out(p, 10);
  const std::vector<float> one(n, 1.0f);
  std::vector<float> means(conv.batch * n), squares(conv.batch * n);
  parallel(conv.batch, 12 * tokens * n, [&](int64_t b) {
    for (int64_t row = 0; row < conv.rows; ++row)
      conv.forward_row(x, b, row, one.data(), conv.zeros.data(), z);
    In mine = z + b * conv.after() + cls;
    Out m = &means[b * n], q = &squares[b * n];
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c) m[c] += mine[t * n + c];
    SIMD for (int64_t c = 0; c < n; ++c) m[c] /= tokens;
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c)
        q[c] += (mine[t * n + c] - m[c]) * (mine[t * n + c] - m[c]);
  });
  std::vector<float> scale(n), shift(n);
  for (int64_t c = 0; c < n; ++c) {  // statistics of the batch from those of its images
    double sum = 0, square = 0;
    for (int64_t b = 0; b < conv.batch; ++b) sum += means[b * n + c];
    const double m = sum / conv.batch;
    for (int64_t b = 0; b < conv.batch; ++b) {
      const double apart = means[b * n + c] - m;
      square += squares[b * n + c] + tokens * apart * apart;
    }
    mean[c] = static_cast<float>(m);
    variance[c] = static_cast<float>(square / (conv.batch * tokens));
    scale[c] = gamma[c] / std::sqrt(variance[c] + in(p, 4)[0]);
    shift[c] = beta[c] - mean[c] * scale[c];
  }
  parallel(conv.batch, 2 * tokens * n, [&](int64_t b) {
    In from = z + b * conv.after();
    Out to = y + b * conv.after();
    std::copy(from, from + cls, to);
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c)
        to[cls + t * n + c] = from[cls + t * n + c] * scale[c] + shift[c];
  });
  return 0;
}

// dy, x, weight, z, mean, variance, gamma, eps, stride, grid -> dx, dweight, dgamma, dbeta
AOT(conv_norm_grad) {
  REQUIRE(params == 14 && Depthwise::fit(ndims, s, 1, 2, 8, 9));
  const Depthwise conv(in(p, 2), s[1], s[8], s[9]);
  const int64_t n = conv.channels, tokens = conv.rows * conv.columns, cls = conv.cls * n;
  SHAPED(0, conv.batch, conv.cls + tokens, n);
  SHAPED(3, conv.batch, conv.cls + tokens, n);
  for (int i : {4, 5, 6, 12, 13}) VECTOR(i, n);
  VECTOR(7, 1);
  SHAPED(10, conv.batch, s[1][1], n);
  SHAPED(11, n, 1, 3, 3);
  In dy = in(p, 0), x = in(p, 1), z = in(p, 3), mean = in(p, 4), gamma = in(p, 6);
  Out dx = out(p, 10), dweight = out(p, 11), dgamma = out(p, 12), dbeta = out(p, 13);
  std::vector<float> inverse(n), sums(2 * conv.batch * n, 0.0f), kernels(conv.batch * 9 * n, 0.0f);
  for (int64_t c = 0; c < n; ++c) inverse[c] = 1.0f / std::sqrt(in(p, 5)[c] + in(p, 7)[0]);
  parallel(conv.batch, 3 * tokens * n, [&](int64_t b) {
    In g = dy + b * conv.after() + cls, a = z + b * conv.after() + cls;
    Out dot = &sums[b * n], sum = &sums[(conv.batch + b) * n];
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c) {
        dot[c] += g[t * n + c] * ((a[t * n + c] - mean[c]) * inverse[c]);
        sum[c] += g[t * n + c];
      }
  });
  total(&sums[0], conv.batch, n, dgamma);
  total(&sums[conv.batch * n], conv.batch, n, dbeta);
  const float number = static_cast<float>(conv.batch * tokens);
  parallel(conv.batch, 30 * tokens * n, [&](int64_t b) {
    In g = dy + b * conv.after() + cls, a = z + b * conv.after() + cls;
    std::vector<float> dz(tokens * n);
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c) {
        const float hat = (a[t * n + c] - mean[c]) * inverse[c];
        const float centred = g[t * n + c] - dbeta[c] / number - hat * dgamma[c] / number;
        dz[t * n + c] = centred * inverse[c] * gamma[c];
      }
    In image = x + b * conv.before();
    Out mine = dx + b * conv.before();
    std::copy(dy + b * conv.after(), dy + b * conv.after() + cls, mine);
    conv.backward(image + cls, dz.data(), mine + cls, &kernels[b * 9 * n]);
  });
  total_kernel(kernels, conv, dweight);
  return 0;
}
