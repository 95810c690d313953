// Threads of the operators: a pool of our own, because OpenMP's is shared with other libraries,
// spins between two loops unless an environment variable was set before the first of them was
// loaded, and does not survive a fork.

#pragma once

#include <cstdint>

// Call run(body, i) for each i of [first, last).
using Part = void (*)(const void* body, int64_t first, int64_t last);

// Run a loop of `count` turns on the pool's threads and the caller's, and return when all are done.
// Turns may run in any order; `cost` is about how many floats each touches.
void run_parallel(int64_t count, int64_t cost, Part part, const void* body);

// body(i) for i in [0, count), as run_parallel. What an inner loop reads should be captured by value
// or copied to a local (pointers as In or Out, since a capture is not restrict): otherwise the
// compiler reads it again in every turn, and layer_norm_grad took up to three times as long.
template <typename Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  run_parallel(
      count, cost,
      [](const void* own, int64_t first, int64_t last) {
        const Body& run = *static_cast<const Body*>(own);
        for (int64_t i = first; i < last; ++i) run(i);
      },
      &body);
}
