// The first branch of a block of few channels, behind the projections: the Linears of queries, keys
// and values, attention, the last Linear and the residual, a few queries at a time. What is between
// exists in the cache only, but for the forward pass's keys and values, and is computed again in the
// backward pass. The channels of a head are whole vectors.

#include "product.h"
#include "softmax.h"

namespace {

// Tensors behind each other: x, q [B, T, C], k, v [B, T', C], four weights [C, C] and four biases
// [C] of queries, keys, values and result, keep [B], scale [1], heads.
struct Branch {
  int64_t batch, queries, keys, n, heads, d;
  In q, k, v, bias_q, bias_k, bias_v, bias, keep;
  float scale;

  Branch(int64_t** s, void** p, int i)
      : batch(s[i][0]), queries(s[i][1]), keys(s[i + 2][1]), n(s[i][2]), heads(s[i + 14][0]),
        d(n / heads), q(in(p, i + 1)), k(in(p, i + 2)), v(in(p, i + 3)), bias_q(in(p, i + 8)),
        bias_k(in(p, i + 9)), bias_v(in(p, i + 10)), bias(in(p, i + 11)), keep(in(p, i + 12)),
        scale(in(p, i + 13)[0]) {}

  static bool fit(const int* ndims, int64_t** s, int i) {
    if (ndims[i] != 3 || ndims[i + 2] != 3 || ndims[i + 14] != 1) return false;
    const int64_t batch = s[i][0], n = s[i][2], heads = s[i + 14][0], keys = s[i + 2][1];
    for (int k = 0; k < 4; ++k)
      if (!has_shape(s[i + 4 + k], ndims[i + 4 + k], {n, n}) ||
          count(s[i + 8 + k], ndims[i + 8 + k]) != n)
        return false;
    return count(s[i], 3) > 0 && keys > 0 && heads > 0 && n % heads == 0 &&
           n / heads % kLanes == 0 &&
           has_shape(s[i + 1], ndims[i + 1], {batch, s[i][1], n}) &&
           has_shape(s[i + 2], 3, {batch, keys, n}) &&
           has_shape(s[i + 3], ndims[i + 3], {batch, keys, n}) &&
           count(s[i + 12], ndims[i + 12]) == batch && count(s[i + 13], ndims[i + 13]) == 1;
  }

  // y = factor (x weight^T + bias) for rows of x
  void linear(In x, int64_t rows, Right weight, In bias, float factor, Rows y) const {
    product({x, n, 1}, rows, n, weight, y);
    for (int64_t r = 0; r < rows; ++r) {
      Out a = y[r];
      SIMD for (int64_t c = 0; c < n; ++c) a[c] = factor * (a[c] + bias[c]);
    }
  }
};

void transpose(Rows from, int64_t rows, int64_t columns, Rows to) {
  for (int64_t c = 0; c < columns; ++c) {
    Out mine = to[c];
    for (int64_t r = 0; r < rows; ++r) mine[r] = from[r][c];
    for (int64_t r = rows; r < to.width; ++r) mine[r] = 0.0f;
  }
}

void add_columns(Rows from, int64_t rows, Out sum) {
  for (int64_t r = 0; r < rows; ++r) {
    In a = from[r];
    SIMD for (int64_t c = 0; c < from.width; ++c) sum[c] += a[c];
  }
}

}  // namespace

// -> x + keep (Linear(attention) + bias) [B, T, C]
AOT(attention_branch) {
  REQUIRE(params == 16 && Branch::fit(ndims, s, 0));
  const Branch z(s, p, 0);
  const int64_t n = z.n, d = z.d, wide = padded(z.keys);
  SHAPED(15, z.batch, z.queries, n);
  In x = in(p, 0);
  Out result = out(p, 15);
  const Packed of_q(in(p, 4), n, n, true), of_k(in(p, 5), n, n, true), of_v(in(p, 6), n, n, true);
  const Packed last(in(p, 7), n, n, true);
  const Memory memory(z.batch * n * (wide + z.keys));
  float* start = memory.start();
  const auto keys = [=](int64_t b) { return Rows{start + b * n * (wide + z.keys), wide, wide}; };
  const auto values = [=](int64_t b) { return Rows{keys(b)[n], n, n}; };
  parallel(z.batch, 8 * z.keys * n, [&](int64_t b) {
    Scratch scratch(z.keys * n);
    const Rows rows = take(&scratch, z.keys, n);
    z.linear(z.k + b * z.keys * n, z.keys, of_k, z.bias_k, 1.0f, rows);
    transpose(rows, z.keys, n, keys(b));
    z.linear(z.v + b * z.keys * n, z.keys, of_v, z.bias_v, 1.0f, values(b));
  });
  const int64_t tile = queries_of(z.queries, z.keys), tiles = (z.queries + tile - 1) / tile;
  parallel(z.batch * tiles, tile * (6 * n + z.keys * z.heads), [&](int64_t i) {
    const int64_t b = i / tiles, first = i % tiles * tile;
    const int64_t rows = std::min(tile, z.queries - first), place = (b * z.queries + first) * n;
    Scratch scratch(tile * (3 * n + wide));
    const Rows queries = take(&scratch, tile, n), mixed = take(&scratch, tile, n);
    const Rows outer = take(&scratch, tile, n), scores = take(&scratch, tile, z.keys);
    z.linear(z.q + place, rows, of_q, z.bias_q, z.scale, queries);
    for (int64_t c = 0; c < n; c += d) {
      product(plain(queries.columns(c, d)), rows, d, keys(b).rows(c), scores);
      softmax(scores, rows, z.keys);
      product(plain(scores), rows, z.keys, values(b).columns(c, d), mixed.columns(c, d));
    }
    product(plain(mixed), rows, n, last, outer);
    const float share = z.keep[b];
    for (int64_t r = 0; r < rows; ++r) {
      In a = x + place + r * n, y = outer[r], bias = z.bias;
      Out to = result + place + r * n;
      SIMD for (int64_t c = 0; c < n; ++c) to[c] = a[c] + share * (y[c] + bias[c]);
    }
  });
  return 0;
}

// dy [B, T, C] and the inputs -> gradients of q, k, v, the four weights and the four biases
AOT(attention_branch_grad) {
  REQUIRE(params == 27 && Branch::fit(ndims, s, 1));
  const Branch z(s, p, 1);
  const int64_t n = z.n, d = z.d, wide = padded(z.keys), tile = queries_of(z.queries, z.keys);
  for (int i : {0, 16}) SHAPED(i, z.batch, z.queries, n);
  for (int i : {17, 18}) SHAPED(i, z.batch, z.keys, n);
  for (int i : {19, 20, 21, 22}) SHAPED(i, n, n);
  for (int i : {23, 24, 25, 26}) VECTOR(i, n);
  In dy = in(p, 0);
  Out dq = out(p, 16), dk = out(p, 17), dv = out(p, 18);
  const Packed of_q(in(p, 5), n, n, true), of_k(in(p, 6), n, n, true), of_v(in(p, 7), n, n, true);
  const Packed q_rows(in(p, 5), n, n), k_rows(in(p, 6), n, n), v_rows(in(p, 7), n, n);
  const Packed last_rows(in(p, 8), n, n);
  const int64_t size = 4 * n * n + 4 * n;  // of a part of the images: weights, then biases
  const int64_t parts = parts_of(z.batch, size);
  const Memory memory(parts * size);
  float* partial = memory.start();
  const int64_t floats = 4 * z.keys * n + 2 * n * wide + tile * (5 * n + (z.heads + 1) * wide);
  const int64_t cost = z.batch / parts * z.queries * (20 * n + 3 * z.keys);
  parallel(parts, cost, [&](int64_t part) {
    float* mine = partial + part * size;
    std::fill_n(mine, size, 0.0f);
    const auto weight = [=](int i) { return Rows{mine + i * n * n, n, n}; };
    const auto of_bias = [=](int i) { return mine + 4 * n * n + i * n; };
    Scratch scratch(floats);
    const Rows keys = take(&scratch, z.keys, n), values = take(&scratch, z.keys, n);
    const Rows keys_across = take(&scratch, n, z.keys), values_across = take(&scratch, n, z.keys);
    const Rows of_keys = take(&scratch, z.keys, n), of_values = take(&scratch, z.keys, n);
    const Rows queries = take(&scratch, tile, n), mixed = take(&scratch, tile, n);
    const Rows grads = take(&scratch, tile, n), of_mixed = take(&scratch, tile, n);
    const Rows of_queries = take(&scratch, tile, n);
    const Rows weights = take(&scratch, z.heads * tile, z.keys);
    const Rows of_scores = take(&scratch, tile, z.keys);
    for (int64_t b = z.batch * part / parts; b < z.batch * (part + 1) / parts; ++b) {
      In k = z.k + b * z.keys * n, v = z.v + b * z.keys * n;
      z.linear(k, z.keys, of_k, z.bias_k, 1.0f, keys);
      transpose(keys, z.keys, n, keys_across);
      z.linear(v, z.keys, of_v, z.bias_v, 1.0f, values);
      transpose(values, z.keys, n, values_across);
      for (int64_t first = 0; first < z.queries; first += tile) {
        const int64_t rows = std::min(tile, z.queries - first), place = (b * z.queries + first) * n;
        const bool add = first > 0;
        z.linear(z.q + place, rows, of_q, z.bias_q, z.scale, queries);
        for (int64_t h = 0, c = 0; h < z.heads; ++h, c += d) {
          const Rows mine = weights.rows(h * tile);
          product(plain(queries.columns(c, d)), rows, d, keys_across.rows(c), mine);
          softmax(mine, rows, z.keys);
          product(plain(mine), rows, z.keys, values.columns(c, d), mixed.columns(c, d));
        }
        const float share = z.keep[b];
        for (int64_t r = 0; r < rows; ++r) {
          In from = dy + place + r * n;
          Out to = grads[r];
          SIMD for (int64_t c = 0; c < n; ++c) to[c] = share * from[c];
        }
        add_columns(grads, rows, of_bias(3));
        product(transposed(grads), n, rows, mixed, weight(3), true);
        product(plain(grads), rows, n, last_rows, of_mixed);
        for (int64_t h = 0, c = 0; h < z.heads; ++h, c += d) {
          const Rows mine = weights.rows(h * tile), of_head = of_mixed.columns(c, d);
          product(plain(of_head), rows, d, values_across.rows(c), of_scores);
          product(transposed(mine), z.keys, rows, of_head, of_values.columns(c, d), add);
          softmax_gradient(mine, rows, of_scores);
          product(transposed(of_scores), z.keys, rows, queries.columns(c, d),
                  of_keys.columns(c, d), add);
          product(plain(of_scores), rows, z.keys, keys.columns(c, d), of_queries.columns(c, d));
        }
        for (int64_t r = 0; r < rows; ++r) {
          Out a = of_queries[r];
          SIMD for (int64_t c = 0; c < n; ++c) a[c] *= z.scale;
        }
        add_columns(of_queries, rows, of_bias(0));
        product(transposed(of_queries), n, rows, {z.q + place, n}, weight(0), true);
        product(plain(of_queries), rows, n, q_rows, {dq + place, n, n});
      }
      const int64_t place = b * z.keys * n;
      add_columns(of_keys, z.keys, of_bias(1));
      add_columns(of_values, z.keys, of_bias(2));
      product(transposed(of_keys), n, z.keys, {k, n}, weight(1), true);
      product(transposed(of_values), n, z.keys, {v, n}, weight(2), true);
      product(plain(of_keys), z.keys, n, k_rows, {dk + place, n, n});
      product(plain(of_values), z.keys, n, v_rows, {dv + place, n, n});
    }
  });
  std::vector<float> sum(size);
  total(partial, parts, size, sum.data());
  for (int i = 0; i < 4; ++i) {
    std::copy_n(&sum[i * n * n], n * n, out(p, 19 + i));
    std::copy_n(&sum[4 * n * n + i * n], n, out(p, 23 + i));
  }
  return 0;
}
