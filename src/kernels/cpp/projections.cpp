// What comes before a block's Linears of queries, keys and values: LayerNorm, then for each of the
// three a 3 x 3 depthwise convolution with padding 1, and BatchNorm. The class token takes only
// LayerNorm. Normalised tokens exist in the cache only, one image and vector of channels at a time.

#include "common.h"

namespace {

const int kProjections = 3;

struct Projection {
  int64_t stride, rows, columns, tokens;  // of its grid
  std::vector<float> kernel;              // [9, C], padded
};

struct Projections {
  int64_t batch, channels, height, width, cls, wide;
  Projection each[kProjections];

  Projections(const int64_t* x, const int64_t* kv_stride, const int64_t* grid, void** p, int weight)
      : batch(x[0]), channels(x[2]), height(grid[0]), width(grid[1]), cls(x[1] - height * width),
        wide(padded(channels)) {
    for (int i = 0; i < kProjections; ++i) {
      Projection& one = each[i];
      one.stride = i ? kv_stride[0] : 1;
      one.rows = (height - 1) / one.stride + 1;
      one.columns = (width - 1) / one.stride + 1;
      one.tokens = one.rows * one.columns;
      one.kernel.assign(9 * wide, 0.0f);
      for (int64_t c = 0; c < channels; ++c)
        for (int k = 0; k < 9; ++k) one.kernel[k * wide + c] = in(p, weight + i)[c * 9 + k];
    }
  }

  // Whether tensors at these places belong together: x [B, cls + H W, C] and LayerNorm's gamma and
  // beta behind it, three weights [C, 1, 3, 3], eps of both norms, stride of keys and values, grid.
  static bool fit(const int* ndims, int64_t** s, int x, int weight, int eps, int stride,
                  int grid) {
    if (ndims[x] != 3 || ndims[stride] != 1 || ndims[grid] != 2) return false;
    for (int i = 0; i < kProjections; ++i)
      if (!has_shape(s[weight + i], ndims[weight + i], {s[x][2], 1, 3, 3}))
        return false;
    const int64_t cls = s[x][1] - s[grid][0] * s[grid][1];
    return count(s[x], 3) > 0 && s[stride][0] > 0 && s[grid][0] > 0 && s[grid][1] > 0 &&
           (cls == 0 || cls == 1) &&
           count(s[x + 1], ndims[x + 1]) == s[x][2] && count(s[x + 2], ndims[x + 2]) == s[x][2] &&
           count(s[eps], ndims[eps]) == 2;
  }

  int64_t tokens() const { return cls + height * width; }

  // Floats of a vector of channels on the grid with a border.
  int64_t plane() const { return (height + 2) * (width + 2) * kLanes; }
  void clear(Vector* of) const { std::fill_n(reinterpret_cast<float*>(of), plane(), 0.0f); }
  Vector* empty_plane(Scratch* scratch) const {
    Vector* taken = reinterpret_cast<Vector*>(scratch->take(plane()));
    clear(taken);
    return taken;
  }
};

// LayerNorm of one image: a vector of its channels at a time, on a grid with a border of zeros.
struct Image {
  const Projections& sizes;
  In x, gamma, beta;
  std::vector<float> mean, inverse;

  // Rows [first, last) of the grid, and the class token.
  Image(const Projections& z, In image, In factor, In shift, float eps, int64_t first, int64_t last)
      : sizes(z), x(image), gamma(factor), beta(shift), mean(z.tokens()), inverse(z.tokens()) {
    const int64_t from = z.cls + first * z.width;
    for (int64_t t = 0; t < z.cls; ++t) statistics(t, eps);
    for (int64_t t = from; t < z.cls + last * z.width; ++t) statistics(t, eps);
  }

  void statistics(int64_t t, float eps) {
    row_statistics(x + t * sizes.channels, sizes.channels, eps, &mean[t], &inverse[t]);
  }

  Vector normalised(int64_t t, int64_t c, int64_t n, Vector factor, Vector shift) const {
    return (load(x + t * sizes.channels + c, n) - mean[t]) * inverse[t] * factor + shift;
  }

  // Rows [first, last) of channels [c, c + n).
  void fill(Vector* plane, int64_t first, int64_t last, int64_t c, int64_t n) const {
    const int64_t across = sizes.width + 2;
    const Vector factor = load(gamma + c, n), shift = load(beta + c, n);
    for (int64_t y = first; y < last; ++y) {
      Vector* row = plane + (y + 1) * across + 1;
      for (int64_t u = 0; u < sizes.width; ++u)
        row[u] = normalised(sizes.cls + y * sizes.width + u, c, n, factor, shift);
    }
  }

  void copy_token(Out to) const {
    for (int64_t c = 0; c < sizes.channels; c += kLanes) {
      const int64_t n = sizes.channels - c;
      store(normalised(0, c, n, load(gamma + c, n), load(beta + c, n)), to + c, n);
    }
  }
};

struct Taps {  // a kernel's nine values for a vector of channels
  Vector w[9];
  Taps(const Projection& one, int64_t wide, int64_t c) {
    for (int k = 0; k < 9; ++k) w[k] = load(&one.kernel[k * wide + c]);
  }
  Vector convolve(const Vector* corner, int64_t across) const {
    Vector sum = w[0] * corner[0];
    for (int k = 1; k < 9; ++k) sum += w[k] * corner[k / 3 * across + k % 3];
    return sum;
  }
};

// body(token, corner of its window in the plane) for each token of a projection's grid.
template <typename Body>
void for_tokens(const Projections& z, const Projection& one, const Body& body) {
  for (int64_t v = 0, t = 0; v < one.rows; ++v)
    for (int64_t u = 0; u < one.columns; ++u, ++t) body(t, one.stride * (v * (z.width + 2) + u));
}

// y = scale convolution(LayerNorm(x)) + shift, three times, to tensors at `to`.
void project(const Projections& z, In x, In gamma, In beta, float eps,
             const std::vector<float>& scale, const std::vector<float>& shift, void** p, int to) {
  // Few images are split by rows; each token's result is the same in any split.
  const int64_t parts = z.batch >= 8 ? 1 : std::min(z.height, (7 + z.batch) / z.batch);
  parallel(z.batch * parts, 12 * z.tokens() * z.channels / parts, [&](int64_t turn) {
    const int64_t b = turn / parts, part = turn % parts, across = z.width + 2;
    const int64_t first = z.height * part / parts, last = z.height * (part + 1) / parts;
    const int64_t above = std::max<int64_t>(first - 1, 0), below = std::min(last + 1, z.height);
    const Image image(z, x + b * z.tokens() * z.channels, gamma, beta, eps, above, below);
    Scratch scratch(z.plane());
    Vector* plane = z.empty_plane(&scratch);
    for (int64_t c = 0; c < z.channels; c += kLanes) {
      const int64_t n = z.channels - c;
      image.fill(plane, above, below, c, n);
      for (int i = 0; i < kProjections; ++i) {
        const Projection& one = z.each[i];
        const Taps taps(one, z.wide, c);
        const Vector factor = load(&scale[i * z.wide + c]), offset = load(&shift[i * z.wide + c]);
        float* y = out(p, to + i) + (b * (z.cls + one.tokens) + z.cls) * z.channels + c;
        for (int64_t v = (first + one.stride - 1) / one.stride; v * one.stride < last; ++v)
          for (int64_t u = 0; u < one.columns; ++u) {
            const Vector* corner = plane + one.stride * (v * across + u);
            const Vector value = taps.convolve(corner, across) * factor + offset;
            store(value, y + (v * one.columns + u) * z.channels, n);
          }
      }
    }
    if (z.cls && part == 0)
      for (int i = 0; i < kProjections; ++i)
        image.copy_token(out(p, to + i) + b * (1 + z.each[i].tokens) * z.channels);
  });
}

}  // namespace

// With given statistics.
// x [B, T, C], LayerNorm's gamma, beta [C], three times weight [C, 1, 3, 3], gamma, beta, mean,
// variance [C] each, eps of LayerNorm and BatchNorm [2], stride, grid -> three times y [B, T', C]
AOT(projections) {
  REQUIRE(params == 24 && Projections::fit(ndims, s, 0, 3, 18, 19, 20));
  const Projections z(s[0], s[19], s[20], p, 3);
  for (int i = 6; i < 18; ++i) VECTOR(i, z.channels);
  for (int i = 0; i < kProjections; ++i)
    SHAPED(21 + i, z.batch, z.cls + z.each[i].tokens, z.channels);
  In x = in(p, 0), gamma = in(p, 1), beta = in(p, 2), eps = in(p, 18);
  std::vector<float> scale(kProjections * z.wide), shift(kProjections * z.wide);
  for (int i = 0; i < kProjections; ++i)
    for (int64_t c = 0; c < z.channels; ++c) {
      const float a = in(p, 6 + i)[c] * (1.0f / std::sqrt(in(p, 15 + i)[c] + eps[1]));
      scale[i * z.wide + c] = a;
      shift[i * z.wide + c] = in(p, 9 + i)[c] - in(p, 12 + i)[c] * a;
    }
  project(z, x, gamma, beta, eps[0], scale, shift, p, 21);
  return 0;
}

// With the statistics of the batch, or where learns = 0 with the given ones, for each of the three.
// The convolution is computed twice, which takes less time than to store and load it.
// x, LayerNorm's gamma, beta, three times weight, gamma, beta, mean, variance each, eps [2],
// learns [3], stride, grid -> three times y [B, T', C], mean, biased variance [C] each
AOT(batch_projections) {
  REQUIRE(params == 31 && Projections::fit(ndims, s, 0, 3, 18, 20, 21));
  const Projections z(s[0], s[20], s[21], p, 3);
  const int64_t wide = z.wide, across = z.width + 2;
  for (int i = 6; i < 18; ++i) VECTOR(i, z.channels);
  VECTOR(19, kProjections);
  for (int i = 0; i < kProjections; ++i) {
    SHAPED(22 + i, z.batch, z.cls + z.each[i].tokens, z.channels);
    VECTOR(25 + i, z.channels);
    VECTOR(28 + i, z.channels);
  }
  In x = in(p, 0), gamma = in(p, 1), beta = in(p, 2), eps = in(p, 18);
  // of each image: mean and sum of squares around it
  const Memory memory(2 * kProjections * z.batch * wide);
  float *means = memory.start(), *squares = means + kProjections * z.batch * wide;
  parallel(z.batch, 20 * z.tokens() * z.channels, [&](int64_t b) {
    const Image image(z, x + b * z.tokens() * z.channels, gamma, beta, eps[0], 0, z.height);
    Scratch scratch(2 * z.plane());
    Vector* plane = z.empty_plane(&scratch);
    Vector* found = reinterpret_cast<Vector*>(scratch.take(z.plane()));
    for (int64_t c = 0; c < z.channels; c += kLanes) {
      image.fill(plane, 0, z.height, c, z.channels - c);
      for (int i = 0; i < kProjections; ++i) {
        const Projection& one = z.each[i];
        const Taps taps(one, wide, c);
        Vector sum{}, square{};
        for_tokens(z, one, [&](int64_t t, int64_t corner) {
          found[t] = taps.convolve(plane + corner, across);
          sum += found[t];
        });
        const Vector mean = sum / static_cast<float>(one.tokens);
        for (int64_t t = 0; t < one.tokens; ++t) square += (found[t] - mean) * (found[t] - mean);
        store(mean, means + (i * z.batch + b) * wide + c);
        store(square, squares + (i * z.batch + b) * wide + c);
      }
    }
  });
  std::vector<float> scale(kProjections * wide), shift(kProjections * wide);
  for (int i = 0; i < kProjections; ++i) {
    Out mean = out(p, 25 + i), variance = out(p, 28 + i);
    const int64_t tokens = z.each[i].tokens;
    const bool learns = in(p, 19)[i] != 0.0f;
    for (int64_t c = 0; c < z.channels; ++c) {  // of the batch, from those of its images
      double sum = 0, square = 0;
      for (int64_t b = 0; b < z.batch; ++b) sum += means[(i * z.batch + b) * wide + c];
      const double m = sum / z.batch;
      for (int64_t b = 0; b < z.batch; ++b) {
        const double apart = means[(i * z.batch + b) * wide + c] - m;
        square += squares[(i * z.batch + b) * wide + c] + tokens * apart * apart;
      }
      mean[c] = learns ? static_cast<float>(m) : in(p, 12 + i)[c];
      variance[c] = learns ? static_cast<float>(square / (z.batch * tokens)) : in(p, 15 + i)[c];
      scale[i * wide + c] = in(p, 6 + i)[c] / std::sqrt(variance[c] + eps[1]);
      shift[i * wide + c] = in(p, 9 + i)[c] - mean[c] * scale[i * wide + c];
    }
  }
  project(z, x, gamma, beta, eps[0], scale, shift, p, 22);
  return 0;
}

// three times dy, x, LayerNorm's gamma, beta, three times weight, gamma, mean, variance each, eps,
// learns, stride, grid ->
// dx, gradients of LayerNorm's gamma, beta, three times of weight, gamma, beta each
AOT(batch_projections_grad) {
  REQUIRE(params == 34 && Projections::fit(ndims, s, 3, 6, 18, 20, 21));
  const Projections z(s[3], s[20], s[21], p, 6);
  const int64_t wide = z.wide, batch = z.batch, across = z.width + 2;
  SHAPED(22, batch, z.tokens(), z.channels);
  VECTOR(19, kProjections);
  VECTOR(23, z.channels);
  VECTOR(24, z.channels);
  for (int i = 0; i < kProjections; ++i) {
    SHAPED(i, batch, z.cls + z.each[i].tokens, z.channels);
    SHAPED(25 + i, z.channels, 1, 3, 3);
    for (int k : {9, 12, 15, 28, 31}) VECTOR(k + i, z.channels);
  }
  In x = in(p, 3), gamma = in(p, 4), beta = in(p, 5), eps = in(p, 18), learns = in(p, 19);
  // Sums of each image, [3, B, C]: of dy times the normalised convolution, and of dy.
  std::vector<float> dots(kProjections * batch * wide), sums(kProjections * batch * wide);
  std::vector<float> inverse(kProjections * wide);
  for (int i = 0; i < kProjections; ++i)
    for (int64_t c = 0; c < z.channels; ++c)
      inverse[i * wide + c] = 1.0f / std::sqrt(in(p, 15 + i)[c] + eps[1]);
  parallel(batch, 20 * z.tokens() * z.channels, [&](int64_t b) {
    const Image image(z, x + b * z.tokens() * z.channels, gamma, beta, eps[0], 0, z.height);
    Scratch scratch(z.plane());
    Vector* plane = z.empty_plane(&scratch);
    for (int64_t c = 0; c < z.channels; c += kLanes) {
      const int64_t n = z.channels - c;
      image.fill(plane, 0, z.height, c, n);
      for (int i = 0; i < kProjections; ++i) {
        const Projection& one = z.each[i];
        const Taps taps(one, wide, c);
        const float* g = in(p, i) + (b * (z.cls + one.tokens) + z.cls) * z.channels + c;
        const Vector mean = load(in(p, 12 + i) + c, n), factor = load(&inverse[i * wide + c]);
        Vector dot{}, sum{};
        for_tokens(z, one, [&](int64_t t, int64_t corner) {
          const Vector dy = load(g + t * z.channels, n);
          dot += dy * ((taps.convolve(plane + corner, across) - mean) * factor);
          sum += dy;
        });
        store(dot, &dots[(i * batch + b) * wide + c]);
        store(sum, &sums[(i * batch + b) * wide + c]);
      }
    }
  });
  std::vector<float> dgamma(kProjections * wide), dbeta(kProjections * wide);
  for (int i = 0; i < kProjections; ++i) {
    total(&dots[i * batch * wide], batch, wide, &dgamma[i * wide]);
    total(&sums[i * batch * wide], batch, wide, &dbeta[i * wide]);
    std::copy_n(&dgamma[i * wide], z.channels, out(p, 28 + i));
    std::copy_n(&dbeta[i * wide], z.channels, out(p, 31 + i));
  }
  // of each image, [B, 3, 9, C] and [B, 2, C]
  std::vector<float> kernels(batch * kProjections * 9 * wide), affine(batch * 2 * wide);
  parallel(batch, 60 * z.tokens() * z.channels, [&](int64_t b) {
    const Image image(z, x + b * z.tokens() * z.channels, gamma, beta, eps[0], 0, z.height);
    Scratch scratch(2 * z.plane());
    Vector* plane = z.empty_plane(&scratch);
    Vector* grads = reinterpret_cast<Vector*>(scratch.take(z.plane()));
    float* dx = out(p, 22) + b * z.tokens() * z.channels;
    for (int64_t c = 0; c < z.channels; c += kLanes) {
      const int64_t n = z.channels - c;
      image.fill(plane, 0, z.height, c, n);
      z.clear(grads);
      Vector token{};
      for (int i = 0; i < kProjections; ++i) {
        const Projection& one = z.each[i];
        const Taps taps(one, wide, c);
        const float* g = in(p, i) + b * (z.cls + one.tokens) * z.channels + c;
        const Vector mean = load(in(p, 12 + i) + c, n), factor = load(&inverse[i * wide + c]);
        const Vector scale = factor * load(in(p, 9 + i) + c, n);
        const float share = learns[i] == 0.0f ? 0.0f : 1.0f / (batch * one.tokens);
        const Vector centre = load(&dbeta[i * wide + c]) * share;
        const Vector slope = load(&dgamma[i * wide + c]) * share;
        if (z.cls) token += load(g, n);
        g += z.cls * z.channels;
        Vector of_taps[9] = {};
        for_tokens(z, one, [&](int64_t t, int64_t corner) {
          const Vector hat = (taps.convolve(plane + corner, across) - mean) * factor;
          const Vector d = (load(g + t * z.channels, n) - centre - hat * slope) * scale;
          for (int k = 0; k < 9; ++k) {
            const int64_t place = corner + k / 3 * across + k % 3;
            of_taps[k] += plane[place] * d;
            grads[place] += taps.w[k] * d;
          }
        });
        for (int k = 0; k < 9; ++k)
          store(of_taps[k], &kernels[((b * kProjections + i) * 9 + k) * wide + c]);
      }
      if (z.cls) store(token, dx + c, n);
      float* inside = dx + z.cls * z.channels + c;
      for (int64_t v = 0; v < z.height; ++v)
        for (int64_t u = 0; u < z.width; ++u, inside += z.channels)
          store(grads[(v + 1) * across + u + 1], inside, n);
    }
    // LayerNorm, in place
    Out of_gamma = &affine[2 * b * wide], of_beta = &affine[(2 * b + 1) * wide];
    const std::vector<float> none(z.channels, 0.0f);
    std::vector<float> row(z.channels);
    for (int64_t t = 0; t < z.tokens(); ++t) {
      Out d = dx + t * z.channels;
      std::copy_n(d, z.channels, row.data());
      row_gradient(image.x + t * z.channels, row.data(), gamma, z.channels, image.mean[t],
                   image.inverse[t], none.data(), d, of_gamma, of_beta);
    }
  });
  std::vector<float> kernel(kProjections * 9 * wide), both(2 * wide);
  total(kernels.data(), batch, kProjections * 9 * wide, kernel.data());
  total(affine.data(), batch, 2 * wide, both.data());
  std::copy_n(&both[0], z.channels, out(p, 23));
  std::copy_n(&both[wide], z.channels, out(p, 24));
  for (int i = 0; i < kProjections; ++i)
    for (int64_t c = 0; c < z.channels; ++c)
      for (int k = 0; k < 9; ++k) out(p, 25 + i)[c * 9 + k] = kernel[(i * 9 + k) * wide + c];
  return 0;
}
