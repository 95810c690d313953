// The part of a training step that does not depend on the batch, in a few passes over all tensors:
// the gradients' norm, the optimizers, the moving average and what goes with them. Parameters are
// updated where they lie. Scalars arrive as tensors of one element.

#include "common.h"

namespace {

const int64_t kPiece = 16384;  // elements of a turn; a turn's sum has a fixed order

// Consecutive tensors among an operator's arguments.
struct Tensors {
  void** p;
  int* ndims;
  int64_t** s;
  int first, number;

  float* at(int i) const { return out(p, first + i); }
  int64_t size(int i) const { return count(s[first + i], ndims[first + i]); }

  int64_t total_size() const {
    int64_t n = 0;
    for (int i = 0; i < number; ++i) n += size(i);
    return n;
  }

  bool fit(const Tensors& other) const {
    if (number != other.number) return false;
    for (int i = 0; i < number; ++i)
      if (size(i) != other.size(i)) return false;
    return true;
  }
};

// A run of elements of one tensor.
struct Piece {
  int tensor;
  int64_t begin, length;
};

std::vector<Piece> pieces(const Tensors& tensors) {
  std::vector<Piece> made;
  for (int i = 0; i < tensors.number; ++i)
    for (int64_t begin = 0, n = tensors.size(i); begin < n; begin += kPiece)
      made.push_back({i, begin, std::min(kPiece, n - begin)});
  return made;
}

// The gradient of each tensor. Gradients come one for each tensor, or several in one bucket, which
// never ends within a tensor. Empty where they do not fit.
std::vector<const float*> gradients_of(const Tensors& tensors, const Tensors& gradients) {
  std::vector<const float*> found;
  int bucket = 0;
  int64_t used = 0;
  for (int i = 0; i < tensors.number; ++i) {
    if (bucket < gradients.number && used == gradients.size(bucket)) ++bucket, used = 0;
    if (bucket == gradients.number || used + tensors.size(i) > gradients.size(bucket)) return {};
    found.push_back(gradients.at(bucket) + used);
    used += tensors.size(i);
  }
  if (bucket != gradients.number - 1 || used != gradients.size(bucket)) return {};
  return found;
}

// Run body(piece) for each piece of the tensors; `arrays` is how many a turn reads or writes.
template <typename Body>
void for_pieces(const Tensors& tensors, int arrays, const Body& body) {
  const std::vector<Piece> all = pieces(tensors);
  const int64_t number = all.size(), mean = number ? tensors.total_size() / number : 0;
  parallel(number, arrays * mean, [&](int64_t i) { body(all[i]); });
}

}  // namespace

// gradients -> their global L2 norm [1]
AOT(gradient_norm) {
  REQUIRE(params > 1);
  const Tensors gradients{p, ndims, s, 0, params - 1};
  VECTOR(params - 1, 1);
  const std::vector<Piece> all = pieces(gradients);
  std::vector<float> sums(all.size());
  parallel(all.size(), kPiece, [&](int64_t i) {
    In g = gradients.at(all[i].tensor) + all[i].begin;
    const int64_t n = all[i].length;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; ++c) sum += g[c] * g[c];
    sums[i] = sum;
  });
  double sum = 0;
  for (float each : sums) sum += each;
  out(p, params - 1)[0] = static_cast<float>(std::sqrt(sum));
  return 0;
}

// active, factor, rate, decay, beta1, beta2, eps, decayed [n], parameters, moments1, moments2 (n
// each), gradients -> [1]
//
// rate includes the bias correction; decay multiplies the parameters whose `decayed` is not 0.
// Without `active` nothing changes, whatever the gradients are.
AOT(adamw) {
  REQUIRE(params > 9);
  for (int i = 0; i < 7; ++i) VECTOR(i, 1);
  const int n = static_cast<int>(count(s[7], ndims[7]));
  REQUIRE(params > 9 + 3 * n);
  const Tensors weights{p, ndims, s, 8, n}, firsts{p, ndims, s, 8 + n, n};
  const Tensors seconds{p, ndims, s, 8 + 2 * n, n};
  const Tensors gradients{p, ndims, s, 8 + 3 * n, params - 9 - 3 * n};
  const std::vector<const float*> grads = gradients_of(weights, gradients);
  REQUIRE(firsts.fit(weights) && seconds.fit(weights) && !grads.empty());
  if (in(p, 0)[0] == 0.0f) return 0;
  const float factor = in(p, 1)[0], rate = in(p, 2)[0], decay = in(p, 3)[0];
  const float rest1 = 1.0f - in(p, 4)[0], rest2 = 1.0f - in(p, 5)[0], eps = in(p, 6)[0];
  In decayed = in(p, 7);
  for_pieces(weights, 4, [&](const Piece& piece) {
    Out w = weights.at(piece.tensor) + piece.begin, m = firsts.at(piece.tensor) + piece.begin;
    Out v = seconds.at(piece.tensor) + piece.begin;
    In grad = grads[piece.tensor] + piece.begin;
    const float keep = decayed[piece.tensor] != 0.0f ? decay : 1.0f;
    const float f = factor, r = rate, a = rest1, b = rest2, e = eps;
    SIMD for (int64_t i = 0; i < piece.length; ++i) {
      const float g = grad[i] * f;
      m[i] += (g - m[i]) * a;
      v[i] += (g * g - v[i]) * b;
      w[i] = w[i] * keep - r * m[i] / (std::sqrt(v[i]) + e);
    }
  });
  return 0;
}

// active, factor, rate, decay, momentum, decayed [n], parameters, velocities (n each), gradients
// -> [1]
AOT(sgd) {
  REQUIRE(params > 7);
  for (int i = 0; i < 5; ++i) VECTOR(i, 1);
  const int n = static_cast<int>(count(s[5], ndims[5]));
  REQUIRE(params > 7 + 2 * n);
  const Tensors weights{p, ndims, s, 6, n}, moments{p, ndims, s, 6 + n, n};
  const Tensors gradients{p, ndims, s, 6 + 2 * n, params - 7 - 2 * n};
  const std::vector<const float*> grads = gradients_of(weights, gradients);
  REQUIRE(moments.fit(weights) && !grads.empty());
  if (in(p, 0)[0] == 0.0f) return 0;
  const float factor = in(p, 1)[0], rate = in(p, 2)[0], decay = in(p, 3)[0];
  const float momentum = in(p, 4)[0];
  In decayed = in(p, 5);
  for_pieces(weights, 3, [&](const Piece& piece) {
    Out w = weights.at(piece.tensor) + piece.begin, v = moments.at(piece.tensor) + piece.begin;
    In grad = grads[piece.tensor] + piece.begin;
    const float add = decayed[piece.tensor] != 0.0f ? decay : 0.0f;
    const float f = factor, r = rate, k = momentum;
    SIMD for (int64_t i = 0; i < piece.length; ++i) {
      v[i] = v[i] * k + (grad[i] * f + add * w[i]);
      w[i] -= r * v[i];
    }
  });
  return 0;
}

// decay, values, averages (as many) -> [1]; averages = decay averages + (1 - decay) values
AOT(moving_average) {
  REQUIRE(params > 3 && params % 2 == 0);
  VECTOR(0, 1);
  const int n = (params - 2) / 2;
  const Tensors values{p, ndims, s, 1, n}, averages{p, ndims, s, 1 + n, n};
  REQUIRE(averages.fit(values));
  const float decay = in(p, 0)[0], rest = 1.0f - decay;
  if (decay == 1.0f) return 0;  // a skipped step
  for_pieces(values, 2, [&](const Piece& piece) {
    In w = values.at(piece.tensor) + piece.begin;
    Out a = averages.at(piece.tensor) + piece.begin;
    const float d = decay, r = rest;
    SIMD for (int64_t i = 0; i < piece.length; ++i) a[i] = a[i] * d + w[i] * r;
  });
  return 0;
}

// keep, gradients, sums (as many) -> [1]; sums = gradients where keep is 0, else sums + gradients
AOT(add_gradients) {
  REQUIRE(params > 3 && params % 2 == 0);
  VECTOR(0, 1);
  const int n = (params - 2) / 2;
  const Tensors gradients{p, ndims, s, 1, n}, sums{p, ndims, s, 1 + n, n};
  REQUIRE(sums.fit(gradients));
  const bool keep = in(p, 0)[0] != 0.0f;
  for_pieces(gradients, 2, [&](const Piece& piece) {
    In g = gradients.at(piece.tensor) + piece.begin;
    Out sum = sums.at(piece.tensor) + piece.begin;
    if (keep) {
      SIMD for (int64_t i = 0; i < piece.length; ++i) sum[i] += g[i];
    } else {
      std::copy(g, g + piece.length, sum);
    }
  });
  return 0;
}

// tensors -> their elements in one [n]
AOT(pack) {
  REQUIRE(params > 1);
  const Tensors tensors{p, ndims, s, 0, params - 1};
  VECTOR(params - 1, tensors.total_size());
  float* to = out(p, params - 1);
  for (int i = 0; i < tensors.number; ++i) {
    In from = tensors.at(i);
    to = std::copy(from, from + tensors.size(i), to);
  }
  return 0;
}

// finite, before [n], after [n], tensors of n elements -> [1]; they become `after`, but `before`
// where that is not finite, or everywhere if `finite` is 0
AOT(keep_finite) {
  REQUIRE(params > 4);
  VECTOR(0, 1);
  const Tensors tensors{p, ndims, s, 3, params - 4};
  VECTOR(1, tensors.total_size());
  VECTOR(2, tensors.total_size());
  const bool finite = in(p, 0)[0] != 0.0f;
  const float *before = in(p, 1), *after = in(p, 2);
  for (int i = 0; i < tensors.number; ++i) {
    const int64_t n = tensors.size(i);
    Out to = tensors.at(i);
    for (int64_t c = 0; c < n; ++c)
      to[c] = finite && std::isfinite(after[c]) ? after[c] : before[c];
    before += n;
    after += n;
  }
  return 0;
}

// mean [C], variance [C], momentum, correction, running mean [C], running variance [C] -> [1]; each
// running value moves by the fraction `momentum` towards the batch's, the variance's times
// `correction`. Products are stored first, so that no compiler fuses them with the sums: the results
// have the bits of MindSpore's operators.
AOT(running_statistics) {
  REQUIRE(params == 15);
  const int64_t c = count(s[0], ndims[0]);
  for (int i : {1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13}) VECTOR(i, c);
  for (int i : {6, 7}) VECTOR(i, 3);
  VECTOR(14, 1);
  std::vector<float> product(c);
  for (int i = 0; i < 6; ++i) {
    const float momentum = in(p, 6)[i % 3], factor = i < 3 ? 1.0f : in(p, 7)[i % 3];
    In value = in(p, i);
    Out running = out(p, 8 + i), own = product.data();
    for (int64_t k = 0; k < c; ++k) own[k] = value[k] * factor;
    for (int64_t k = 0; k < c; ++k) own[k] = (own[k] - running[k]) * momentum;
    for (int64_t k = 0; k < c; ++k) running[k] += own[k];
  }
  return 0;
}
