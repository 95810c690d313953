// Products of small matrices whose operands are in the cache, for operators that work on a tile of
// rows at a time and add up the gradients of weights over parts of the rows.

#pragma once

#include "common.h"

const int kRows = kLanes == 16 ? 8 : 4;  // of a product at a time; their sums fit into registers
const int64_t kTile = 64;                // rows of an operator's matrices at a time

// The number of parts, of at most `most`, that each have a sum of `size` floats: 4 to 32, so that the
// sums take a few MiB.
inline int64_t parts_of(int64_t most, int64_t size) {
  return std::min(most, std::clamp<int64_t>((int64_t{1} << 19) / size, 4, 32));
}

// A matrix of whole vectors: rows of `width` columns, each `stride` behind the one before.
struct Rows {
  float* data;
  int64_t width, stride;
  float* operator[](int64_t i) const { return data + i * stride; }
  Rows columns(int64_t first, int64_t number) const { return {data + first, number, stride}; }
  Rows rows(int64_t first) const { return {data + first * stride, width, stride}; }
};

// Memory for a matrix whose rows are padded to whole vectors.
inline Rows take(Scratch* scratch, int64_t rows, int64_t columns) {
  const int64_t width = padded(columns);
  return {scratch->take(rows * width), width, width};
}

// The left factor of a product, or its transpose: element (i, k) is data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// The right factor, whole vectors of columns.
struct Right {
  const float* data;
  int64_t stride;
  Right(const float* start, int64_t length) : data(start), stride(length) {}
  Right(Rows rows) : data(rows.data), stride(rows.stride) {}
};

inline Left plain(Rows a) { return {a.data, a.stride, 1}; }
inline Left transposed(Rows a) { return {a.data, 1, a.stride}; }

// R rows and V vectors of columns of c = a b, or of c += a b, summed over k in order, in registers:
// without the pragmas GCC keeps `sums` in memory before and after the loop over k.
template <int R, int V>
void product_tile(Left a, int64_t depth, const float* b, int64_t b_row, float* c, int64_t c_row,
                  bool add) {
  Vector sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      sums[i][v] = add ? load(c + i * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k, b += b_row, a.data += a.column) {
    Vector right[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[i][v] += a.data[i * a.row] * right[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sums[i][v], c + i * c_row + v * kLanes);
}

template <int R, int V>
void product_columns(Left a, int64_t rows, int64_t depth, const float* b, int64_t b_row, float* c,
                     int64_t c_row, bool add) {
  for (; rows >= R; rows -= R, a.data += R * a.row, c += R * c_row)
    product_tile<R, V>(a, depth, b, b_row, c, c_row, add);
  if constexpr (R > 1) product_columns<R / 2, V>(a, rows, depth, b, b_row, c, c_row, add);
}

// The padding of b may be undefined: it reaches only the padding of c.
// c = a b, or c += a b, for the first `rows` rows of a and c.
inline void product(Left a, int64_t rows, int64_t depth, Right b, Rows c, bool add = false) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= c.width; j += 2 * kLanes)
    product_columns<kRows, 2>(a, rows, depth, b.data + j, b.stride, c.data + j, c.stride, add);
  if (j < c.width)
    product_columns<kRows, 1>(a, rows, depth, b.data + j, b.stride, c.data + j, c.stride, add);
}

// A matrix in memory of its own, padded: `data` [rows, columns] or its transpose.
class Packed {
 public:
  Packed(In data, int64_t rows, int64_t columns, bool transpose = false)
      : width_(padded(transpose ? rows : columns)), memory_((transpose ? columns : rows) * width_) {
    float* start = memory_.start();
    const int64_t width = width_;
    parallel(transpose ? columns : rows, width, [=](int64_t i) {
      Out mine = start + i * width;
      const int64_t n = transpose ? rows : columns;
      const int64_t step = transpose ? columns : 1, first = transpose ? i : i * columns;
      for (int64_t j = 0; j < n; ++j) mine[j] = data[first + j * step];
      for (int64_t j = n; j < width; ++j) mine[j] = 0.0f;
    });
  }
  operator Right() const { return {memory_.start(), width_}; }

 private:
  int64_t width_;
  Memory memory_;
};
