// A few rows times a few vectors of columns, in registers: what gru.cpp and runs.cpp are made of.
//
// Each is built with this text before its own, and with HIGHWAY_TYPE defined as float or double.

#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_WIN32)
#define HIGHWAY_EXPORT extern "C" __declspec(dllexport)
#else
#define HIGHWAY_EXPORT extern "C"
#endif

namespace {

using T = HIGHWAY_TYPE;
using V = at::vec::Vectorized<T>;
constexpr int64_t N = V::size();
constexpr int kRegisters = sizeof(V) == 64 ? 32 : 16;

// Of a parallel region: which thread this is, and how many there are. Fewer may come than were asked for, so parts are
// dealt out, not owned.
struct Team {
  int64_t me = 0, present = 1;
  Team() {
#ifdef _OPENMP
    me = omp_get_thread_num(), present = omp_get_num_threads();
#endif
  }
};

// `left` [rows, depth] times `packed` [depth][columns][N]; then finish(row, sums [columns]) for every row. With few rows
// the sum is taken apart into `sums`, so that one addition need not wait for the last.
//
// Every index of `total` is a constant: of an array that is indexed with a variable, compilers leave all of it in memory,
// which takes two to three times as long.
template <int rows, int columns, int sums, typename Finish>
inline void product(const T* left, const T* packed, int64_t depth, Finish finish) {
  constexpr int size = rows * columns;
  V total[size * sums], weights[columns], factor;
  c10::ForcedUnroll<size * sums>{}([&](auto i) { total[i] = V(T(0)); });
  auto add = [&](auto i, auto s, int64_t k) {
    constexpr int row = i / columns, column = i % columns, at = s * size + i;
    if constexpr (row == 0) weights[column] = V::loadu(packed + column * N);
    if constexpr (column == 0) factor = V(left[row * depth + k]);
    total[at] = at::vec::fmadd(factor, weights[column], total[at]);
  };
  auto add_all = [&](auto s, int64_t k) {
    c10::ForcedUnroll<size>{}(add, s, k);
    packed += columns * N;
  };
  int64_t k = 0;
  for (; k + sums <= depth; k += sums) c10::ForcedUnroll<sums>{}([&](auto s) { add_all(s, k + s); });
  if constexpr (sums > 1)
    for (; k < depth; ++k) add_all(std::integral_constant<int, 0>{}, k);
  c10::ForcedUnroll<rows>{}([&](auto row) {
    V of_row[columns];
    c10::ForcedUnroll<columns>{}([&](auto column) {
      constexpr int i = row * columns + column;
      V sum = total[i];
      c10::ForcedUnroll<sums>{}([&](auto s) {
        if constexpr (s > 0) sum = sum + total[s * size + i];
      });
      of_row[column] = sum;
    });
    finish(row, of_row);
  });
}

}  // namespace
