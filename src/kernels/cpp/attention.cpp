// Scaled dot-product attention of every head, with the biases of its three Linears. The scores
// exist for a few queries at a time, in the cache, and are computed again in the backward pass.

#include "product.h"
#include "softmax.h"

namespace {

// The sizes of an operator's tensors: q [B, T, C], k and v [B, T', C], C = heads * d.
struct Sizes {
  int64_t batch, heads, queries, keys, channels, d, tile;

  Sizes(const int64_t* q, const int64_t* k, const int64_t* h)
      : batch(q[0]), heads(h[0]), queries(q[1]), keys(k[1]), channels(q[2]), d(channels / heads),
        tile(queries_of(queries, keys)) {}

  static bool fit(const int* ndims, int64_t** s, int q, int heads) {
    if (ndims[q] != 3 || ndims[q + 1] != 3 || ndims[heads] != 1) return false;
    for (int i : {q + 3, q + 4, q + 5})
      if (count(s[i], ndims[i]) != s[q][2]) return false;
    return count(s[q], 3) > 0 && s[q + 1][1] > 0 && s[heads][0] > 0 &&
           s[q][2] % s[heads][0] == 0 &&
           has_shape(s[q + 1], 3, {s[q][0], s[q + 1][1], s[q][2]}) &&
           has_shape(s[q + 2], ndims[q + 2], {s[q][0], s[q + 1][1], s[q][2]}) &&
           count(s[heads - 1], ndims[heads - 1]) == 1;
  }

  // One head's row `token` of a tensor of `tokens` tokens; i counts images and heads.
  int64_t place(int64_t i, int64_t tokens, int64_t token) const {
    return (i / heads * tokens + token) * channels + i % heads * d;
  }

  // to = factor (x + bias), rows of one head
  void load(In x, In bias, float factor, int64_t rows, Rows to) const {
    for (int64_t r = 0; r < rows; ++r) {
      Out mine = to[r];
      for (int64_t c = d; c < to.width; ++c) mine[c] = 0.0f;
      SIMD for (int64_t c = 0; c < d; ++c) mine[c] = factor * (x[r * channels + c] + bias[c]);
    }
  }
  // The same, transposed, for keys and values: [d, T']
  void load_transposed(In x, In bias, Rows to) const {
    for (int64_t c = 0; c < d; ++c) {
      Out mine = to[c];
      for (int64_t t = 0; t < keys; ++t) mine[t] = x[t * channels + c] + bias[c];
      for (int64_t t = keys; t < to.width; ++t) mine[t] = 0.0f;
    }
  }
  void store(Rows from, int64_t rows, Out x) const {
    for (int64_t r = 0; r < rows; ++r) std::copy(from[r], from[r] + d, x + r * channels);
  }
};

}  // namespace

// q [B, T, C], k, v [B, T', C], their biases [C], scale [1], heads ->
// softmax(scale (q + bias) (k + bias)^T) (v + bias) [B, T, C]
AOT(attention) {
  REQUIRE(params == 9 && Sizes::fit(ndims, s, 0, 7));
  const Sizes z(s[0], s[1], s[7]);
  SHAPED(8, z.batch, z.queries, z.channels);
  In q = in(p, 0), k = in(p, 1), v = in(p, 2), of_q = in(p, 3), of_k = in(p, 4), of_v = in(p, 5);
  Out y = out(p, 8);
  const float scale = in(p, 6)[0];
  // Few images and heads are split by queries; each query's result is the same in any split.
  const int64_t units = z.batch * z.heads, tiles = (z.queries + z.tile - 1) / z.tile;
  const int64_t parts = units >= 8 ? 1 : std::min(tiles, (8 + units - 1) / units);
  const int64_t wide = padded(z.keys), d = padded(z.d);
  const int64_t floats = z.d * wide + z.keys * d + z.tile * (wide + 2 * d);
  parallel(units * parts, 2 * z.queries * (z.keys + z.d) / parts, [&](int64_t turn) {
    const int64_t i = turn / parts, part = turn % parts, head = i % z.heads * z.d;
    Scratch scratch(floats);
    const Rows keys = take(&scratch, z.d, z.keys), values = take(&scratch, z.keys, z.d);
    const Rows queries = take(&scratch, z.tile, z.d), scores = take(&scratch, z.tile, z.keys);
    const Rows mixed = take(&scratch, z.tile, z.d);
    z.load_transposed(k + z.place(i, z.keys, 0), of_k + head, keys);
    z.load(v + z.place(i, z.keys, 0), of_v + head, 1.0f, z.keys, values);
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const int64_t first = t * z.tile, rows = std::min(z.tile, z.queries - first);
      z.load(q + z.place(i, z.queries, first), of_q + head, scale, rows, queries);
      product(plain(queries), rows, z.d, keys, scores);
      softmax(scores, rows, z.keys);
      product(plain(scores), rows, z.keys, values, mixed);
      z.store(mixed, rows, y + z.place(i, z.queries, first));
    }
  });
  return 0;
}

// dy [B, T, C] and the inputs of attention -> gradients of q, k, v and their biases
AOT(attention_grad) {
  REQUIRE(params == 15 && Sizes::fit(ndims, s, 1, 8));
  const Sizes z(s[1], s[2], s[8]);
  for (int i : {0, 9}) SHAPED(i, z.batch, z.queries, z.channels);
  for (int i : {10, 11}) SHAPED(i, z.batch, z.keys, z.channels);
  for (int i : {12, 13, 14}) VECTOR(i, z.channels);
  In dy = in(p, 0), q = in(p, 1), k = in(p, 2), v = in(p, 3);
  In of_q = in(p, 4), of_k = in(p, 5), of_v = in(p, 6);
  Out dq = out(p, 9), dk = out(p, 10), dv = out(p, 11);
  const float scale = in(p, 7)[0];
  const int64_t size = z.batch * z.channels;
  std::vector<float> partial(3 * size, 0.0f), none(z.channels, 0.0f);
  Out sums = partial.data();
  const int64_t wide = padded(z.keys), d = padded(z.d);
  const int64_t floats = 2 * z.d * wide + 3 * z.keys * d + z.tile * (2 * wide + 3 * d);
  parallel(z.batch * z.heads, 5 * z.queries * (z.keys + z.d), [&](int64_t i) {
    const int64_t head = i % z.heads * z.d, mine = i / z.heads * z.channels + head;
    Scratch scratch(floats);
    const Rows keys = take(&scratch, z.d, z.keys), values = take(&scratch, z.d, z.keys);
    const Rows k_rows = take(&scratch, z.keys, z.d);
    const Rows of_keys = take(&scratch, z.keys, z.d), of_values = take(&scratch, z.keys, z.d);
    const Rows weights = take(&scratch, z.tile, z.keys), of_scores = take(&scratch, z.tile, z.keys);
    const Rows queries = take(&scratch, z.tile, z.d), grads = take(&scratch, z.tile, z.d);
    const Rows of_queries = take(&scratch, z.tile, z.d);
    z.load_transposed(k + z.place(i, z.keys, 0), of_k + head, keys);
    z.load_transposed(v + z.place(i, z.keys, 0), of_v + head, values);
    z.load(k + z.place(i, z.keys, 0), of_k + head, 1.0f, z.keys, k_rows);
    for (int64_t first = 0; first < z.queries; first += z.tile) {
      const int64_t rows = std::min(z.tile, z.queries - first);
      z.load(q + z.place(i, z.queries, first), of_q + head, scale, rows, queries);
      z.load(dy + z.place(i, z.queries, first), none.data(), 1.0f, rows, grads);
      product(plain(queries), rows, z.d, keys, weights);
      softmax(weights, rows, z.keys);
      product(plain(grads), rows, z.d, values, of_scores);
      product(transposed(weights), z.keys, rows, grads, of_values, first > 0);
      softmax_gradient(weights, rows, of_scores);
      product(transposed(of_scores), z.keys, rows, queries, of_keys, first > 0);
      product(plain(of_scores), rows, z.keys, k_rows, of_queries);
      for (int64_t r = 0; r < rows; ++r) {
        Out d = of_queries[r], sum = sums + mine;
        SIMD for (int64_t c = 0; c < z.d; ++c) {
          d[c] *= scale;
          sum[c] += d[c];
        }
      }
      z.store(of_queries, rows, dq + z.place(i, z.queries, first));
    }
    for (int64_t t = 0; t < z.keys; ++t) {
      In a = of_keys[t], b = of_values[t];
      Out c_keys = sums + size + mine, c_values = sums + 2 * size + mine;
      SIMD for (int64_t c = 0; c < z.d; ++c) c_keys[c] += a[c];
      SIMD for (int64_t c = 0; c < z.d; ++c) c_values[c] += b[c];
    }
    z.store(of_keys, z.keys, dk + z.place(i, z.keys, 0));
    z.store(of_values, z.keys, dv + z.place(i, z.keys, 0));
  });
  for (int i = 0; i < 3; ++i) total(sums + i * size, z.batch, z.channels, out(p, 12 + i));
  return 0;
}
