// Operators of CvT for CPUs, forward and backward, on tokens [B, T, C]: class token first where
// there is one (T = cls + H W), then the grid row by row, channels innermost. All float32.
//
// Called by MindSpore's ops.Custom (func_type "aot"): inputs, then outputs, with their shapes; 0 is
// success. Integers, like the grid H x W, arrive as the shape of a tensor. Every sum has a fixed order, whatever the
// number of threads: partial sums by image or by block of rows, added up in double, in turn.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define AOT(name)                                                                              \
  extern "C" int name(int, void** p, int* ndims, int64_t** s, const char**, void*, void*)
#define PARALLEL _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")

namespace {

using In = const float* __restrict;
using Out = float* __restrict;

const int64_t kBlock = 256;  // rows of a partial sum

In in(void** p, int i) { return static_cast<const float*>(p[i]); }
Out out(void** p, int i) { return static_cast<float*>(p[i]); }

int64_t count(const int64_t* shape, int ndim) {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

// Add up partial sums [n, c].
void total(In partial, int64_t n, int64_t c, Out sum) {
  std::vector<double> t(c, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) t[j] += partial[i * c + j];
  for (int64_t j = 0; j < c; ++j) sum[j] = static_cast<float>(t[j]);
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

// A 3 x 3 depthwise convolution with padding 1 over a grid, and the way back through it.
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

}  // namespace

// x [..., C], gamma, beta, eps [1] -> y, mean [M], 1 / deviation [M]
AOT(layer_norm) {
  const int64_t n = s[1][0], rows = count(s[0], ndims[0]) / n;
  In x = in(p, 0), gamma = in(p, 1), beta = in(p, 2);
  Out y = out(p, 4), mean = out(p, 5), inverse = out(p, 6);
  const float eps = in(p, 3)[0];
  PARALLEL for (int64_t r = 0; r < rows; ++r) {
    In a = x + r * n;
    Out b = y + r * n;
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; ++c) sum += a[c];
    const float m = sum / n;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < n; ++c) squares += (a[c] - m) * (a[c] - m);
    const float i = 1.0f / std::sqrt(squares / n + eps);
    SIMD for (int64_t c = 0; c < n; ++c) b[c] = (a[c] - m) * i * gamma[c] + beta[c];
    mean[r] = m;
    inverse[r] = i;
  }
  return 0;
}

// dy, x [..., C], gamma [C], mean, 1 / deviation [M] -> dx, dgamma, dbeta
AOT(layer_norm_grad) {
  const int64_t n = s[2][0], rows = count(s[1], ndims[1]) / n, blocks = (rows + kBlock - 1) / kBlock;
  In dy = in(p, 0), x = in(p, 1), gamma = in(p, 2), mean = in(p, 3), inverse = in(p, 4);
  Out dx = out(p, 5);
  std::vector<float> partial(2 * blocks * n, 0.0f);
  PARALLEL for (int64_t k = 0; k < blocks; ++k) {
    Out dgamma = &partial[k * n], dbeta = &partial[(blocks + k) * n];
    for (int64_t r = k * kBlock; r < std::min(rows, (k + 1) * kBlock); ++r) {
      In a = x + r * n, g = dy + r * n;
      Out d = dx + r * n;
      const float m = mean[r], i = inverse[r];
      float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t c = 0; c < n; ++c) {
        const float scaled = g[c] * gamma[c];
        sum += scaled;
        dot += scaled * ((a[c] - m) * i);
      }
      sum /= n;
      dot /= n;
      SIMD for (int64_t c = 0; c < n; ++c) {
        const float hat = (a[c] - m) * i;
        d[c] = (g[c] * gamma[c] - sum - hat * dot) * i;
        dgamma[c] += g[c] * hat;
        dbeta[c] += g[c];
      }
    }
  }
  total(&partial[0], blocks, n, out(p, 6));
  total(&partial[blocks * n], blocks, n, out(p, 7));
  return 0;
}

// x [..., C], scale [1] -> softmax(scale x), scale > 0
AOT(softmax) {
  const int64_t n = s[0][ndims[0] - 1], rows = count(s[0], ndims[0]) / n;
  In x = in(p, 0);
  Out y = out(p, 2);
  const float scale = in(p, 1)[0];
  PARALLEL for (int64_t r = 0; r < rows; ++r) {
    In a = x + r * n;
    Out b = y + r * n;
    float top = a[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < n; ++c) top = a[c] > top ? a[c] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; ++c) {
      b[c] = exponential(scale * (a[c] - top));
      sum += b[c];
    }
    const float share = 1.0f / sum;
    SIMD for (int64_t c = 0; c < n; ++c) b[c] *= share;
  }
  return 0;
}

// dy, y [..., C], scale [1] -> dx
AOT(softmax_grad) {
  const int64_t n = s[0][ndims[0] - 1], rows = count(s[0], ndims[0]) / n;
  In dy = in(p, 0), y = in(p, 1);
  Out dx = out(p, 3);
  const float scale = in(p, 2)[0];
  PARALLEL for (int64_t r = 0; r < rows; ++r) {
    In g = dy + r * n, b = y + r * n;
    Out d = dx + r * n;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < n; ++c) dot += g[c] * b[c];
    SIMD for (int64_t c = 0; c < n; ++c) d[c] = scale * b[c] * (g[c] - dot);
  }
  return 0;
}

// x [B, T, C], weight [C, 1, 3, 3], scale, shift [C], stride, grid -> scale * conv(x) + shift
AOT(depthwise) {
  const Depthwise conv(in(p, 1), s[0], s[4], s[5]);
  In x = in(p, 0), scale = in(p, 2), shift = in(p, 3);
  Out y = out(p, 6);
  PARALLEL for (int64_t i = 0; i < conv.batch * conv.rows; ++i)
    conv.forward_row(x, i / conv.rows, i % conv.rows, scale, shift, y);
  return 0;
}

// Convolution and BatchNorm of a batch's own statistics.
// x [B, T, C], weight, gamma, beta, eps, stride, grid -> y, z = conv(x), mean, biased variance
AOT(conv_norm) {
  const Depthwise conv(in(p, 1), s[0], s[5], s[6]);
  const int64_t n = conv.channels, tokens = conv.rows * conv.columns, cls = conv.cls * n;
  In x = in(p, 0), gamma = in(p, 2), beta = in(p, 3);
  Out y = out(p, 7), z = out(p, 8), mean = out(p, 9), variance = out(p, 10);
  const std::vector<float> one(n, 1.0f);
  std::vector<float> means(conv.batch * n), squares(conv.batch * n);
  PARALLEL for (int64_t b = 0; b < conv.batch; ++b) {
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
  }
  std::vector<float> scale(n), shift(n);
  for (int64_t c = 0; c < n; ++c) {  // of the images' means and deviations, those of all
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
  PARALLEL for (int64_t b = 0; b < conv.batch; ++b) {
    In from = z + b * conv.after();
    Out to = y + b * conv.after();
    std::copy(from, from + cls, to);
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c)
        to[cls + t * n + c] = from[cls + t * n + c] * scale[c] + shift[c];
  }
  return 0;
}

// dy, x, weight, z, mean, variance, gamma, eps, stride, grid -> dx, dweight, dgamma, dbeta
AOT(conv_norm_grad) {
  const Depthwise conv(in(p, 2), s[1], s[8], s[9]);
  const int64_t n = conv.channels, tokens = conv.rows * conv.columns, cls = conv.cls * n;
  In dy = in(p, 0), x = in(p, 1), z = in(p, 3), mean = in(p, 4), gamma = in(p, 6);
  Out dx = out(p, 10), dweight = out(p, 11), dgamma = out(p, 12), dbeta = out(p, 13);
  std::vector<float> inverse(n), sums(2 * conv.batch * n, 0.0f), kernels(conv.batch * 9 * n, 0.0f);
  for (int64_t c = 0; c < n; ++c) inverse[c] = 1.0f / std::sqrt(in(p, 5)[c] + in(p, 7)[0]);
  PARALLEL for (int64_t b = 0; b < conv.batch; ++b) {
    In g = dy + b * conv.after() + cls, a = z + b * conv.after() + cls;
    Out dot = &sums[b * n], sum = &sums[(conv.batch + b) * n];
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < n; ++c) {
        dot[c] += g[t * n + c] * ((a[t * n + c] - mean[c]) * inverse[c]);
        sum[c] += g[t * n + c];
      }
  }
  total(&sums[0], conv.batch, n, dgamma);
  total(&sums[conv.batch * n], conv.batch, n, dbeta);
  const float number = static_cast<float>(conv.batch * tokens);
  PARALLEL for (int64_t b = 0; b < conv.batch; ++b) {
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
  }
  std::vector<float> kernel(9 * n);
  total(kernels.data(), conv.batch, 9 * n, kernel.data());
  for (int64_t c = 0; c < n; ++c)
    for (int k = 0; k < 9; ++k) dweight[c * 9 + k] = kernel[k * n + c];
  return 0;
}

// x [M, C], bias [C] -> activation(x + bias)
template <typename Activation>
int bias_activation(void** p, int64_t** s) {
  const int64_t rows = s[0][0], n = s[0][1];
  In x = in(p, 0), bias = in(p, 1);
  Out y = out(p, 2);
  PARALLEL for (int64_t r = 0; r < rows; ++r)
    SIMD for (int64_t c = 0; c < n; ++c)
      y[r * n + c] = Activation::value(x[r * n + c] + bias[c]);
  return 0;
}

// dy, x [M, C], bias [C] -> dx, dbias
template <typename Activation>
int bias_activation_grad(void** p, int64_t** s) {
  const int64_t rows = s[0][0], n = s[0][1], blocks = (rows + kBlock - 1) / kBlock;
  In dy = in(p, 0), x = in(p, 1), bias = in(p, 2);
  Out dx = out(p, 3);
  std::vector<float> partial(blocks * n, 0.0f);
  PARALLEL for (int64_t k = 0; k < blocks; ++k) {
    Out sum = &partial[k * n];
    for (int64_t r = k * kBlock; r < std::min(rows, (k + 1) * kBlock); ++r)
      SIMD for (int64_t c = 0; c < n; ++c) {
        const float d = dy[r * n + c] * Activation::slope(x[r * n + c] + bias[c]);
        dx[r * n + c] = d;
        sum[c] += d;
      }
  }
  total(partial.data(), blocks, n, out(p, 4));
  return 0;
}

AOT(bias_quick_gelu) { return bias_activation<QuickGelu>(p, s); }
AOT(bias_quick_gelu_grad) { return bias_activation_grad<QuickGelu>(p, s); }
AOT(bias_gelu) { return bias_activation<Gelu>(p, s); }
AOT(bias_gelu_grad) { return bias_activation_grad<Gelu>(p, s); }

// x [B, T, h d], bias [h d], h -> x + bias as heads [B, h, T, d]
AOT(split_heads) {
  const int64_t heads = s[3][1], tokens = s[3][2], d = s[3][3];
  In x = in(p, 0), bias = in(p, 1);
  Out y = out(p, 3);
  PARALLEL for (int64_t i = 0; i < s[0][0] * heads; ++i) {
    In from = x + i / heads * tokens * heads * d + i % heads * d, b = bias + i % heads * d;
    Out to = y + i * tokens * d;
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < d; ++c) to[t * d + c] = from[t * heads * d + c] + b[c];
  }
  return 0;
}

// x [B, h, T, d], h -> tokens [B, T, h d], sums over them [h d]
AOT(merge_heads) {
  const int64_t batch = s[0][0], heads = s[0][1], tokens = s[0][2], d = s[0][3], n = heads * d;
  In x = in(p, 0);
  Out y = out(p, 2);
  std::vector<float> partial(batch * n, 0.0f);
  PARALLEL for (int64_t i = 0; i < batch * heads; ++i) {
    In from = x + i * tokens * d;
    Out to = y + i / heads * tokens * n + i % heads * d, sum = &partial[i * d];
    for (int64_t t = 0; t < tokens; ++t)
      SIMD for (int64_t c = 0; c < d; ++c) {
        to[t * n + c] = from[t * d + c];
        sum[c] += from[t * d + c];
      }
  }
  total(partial.data(), batch, n, out(p, 3));
  return 0;
}

// x, z [B, T, C], bias [C], keep [B] -> x + keep (z + bias)
AOT(bias_residual) {
  const int64_t batch = s[0][0], tokens = s[0][1], n = s[0][2];
  In x = in(p, 0), z = in(p, 1), bias = in(p, 2), keep = in(p, 3);
  Out y = out(p, 4);
  PARALLEL for (int64_t r = 0; r < batch * tokens; ++r) {
    const float k = keep[r / tokens];
    SIMD for (int64_t c = 0; c < n; ++c) y[r * n + c] = x[r * n + c] + k * (z[r * n + c] + bias[c]);
  }
  return 0;
}

// dy [B, T, C], keep [B] -> dz, dbias
AOT(bias_residual_grad) {
  const int64_t tokens = s[0][1], n = s[0][2], rows = s[0][0] * tokens;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  In dy = in(p, 0), keep = in(p, 1);
  Out dz = out(p, 2);
  std::vector<float> partial(blocks * n, 0.0f);
  PARALLEL for (int64_t k = 0; k < blocks; ++k) {
    Out sum = &partial[k * n];
    for (int64_t r = k * kBlock; r < std::min(rows, (k + 1) * kBlock); ++r) {
      const float factor = keep[r / tokens];
      SIMD for (int64_t c = 0; c < n; ++c) {
        const float d = factor * dy[r * n + c];
        dz[r * n + c] = d;
        sum[c] += d;
      }
    }
  }
  total(partial.data(), blocks, n, out(p, 3));
  return 0;
}

// The windows of a k x k convolution as rows of a matrix, and the way back.
struct Windows {
  int64_t batch, tokens, height, width, channels, size, stride, padding, rows, columns;

  // sizes: k, stride, padding + 1
  Windows(const int64_t* shape, const int64_t* sizes, const int64_t* grid)
      : batch(shape[0]), tokens(shape[1]), height(grid[0]), width(grid[1]), channels(shape[2]),
        size(sizes[0]), stride(sizes[1]), padding(sizes[2] - 1),
        rows((height + 2 * padding - size) / stride + 1),
        columns((width + 2 * padding - size) / stride + 1) {}

  int64_t from_row(int64_t y, int64_t k) const { return y * stride + k - padding; }

  // The columns of a window that lie inside: the first, and how many.
  void span(int64_t x, int64_t* first, int64_t* count) const {
    const int64_t left = x * stride - padding;
    *first = std::max<int64_t>(0, -left);
    *count = std::max<int64_t>(0, std::min(size, width - left) - *first);
  }
};

// x [B, H W, C], sizes, grid -> [B N, k k C]
AOT(unfold) {
  const Windows w(s[0], s[1], s[2]);
  const int64_t n = w.channels, run = w.size * n, length = w.size * run;
  In x = in(p, 0);
  Out y = out(p, 3);
  PARALLEL for (int64_t i = 0; i < w.batch * w.rows; ++i) {
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
  }
  return 0;
}

// dy [B N, k k C], sizes, grid, x -> dx [B, H W, C]
AOT(unfold_grad) {
  const Windows w(s[3], s[1], s[2]);
  const int64_t n = w.channels, run = w.size * n, length = w.size * run;
  In dy = in(p, 0);
  Out dx = out(p, 4);
  PARALLEL for (int64_t b = 0; b < w.batch; ++b) {
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
  }
  return 0;
}
