// The forward pass of one GRU layer on a CPU, all time steps in one call. Built once for each dtype that is used, with
// HIGHWAY_TYPE defined as float or double.
//
//     r = sigmoid(x_r + W_hr h)    z = sigmoid(x_z + W_hz h)    n = tanh(x_n + r (W_hn h + b_hn))    h' = n + z (h - n)
//
// with x_* = W_i* x + b_i* (+ b_hr, b_hz) of all steps given. A step is far too little work for a call of a matrix
// library and one call each for what follows it; here the products of a few rows and columns stay in registers (product.h)
// until the gates are made of them.
//
// Note [Who computes what]
// Rows of the batch are recurrences of their own: threads that share them out never wait for one another. Only where
// there are fewer rows than threads, and a step is long, do they share out the columns and meet after every step.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int kTall = kRegisters == 32 ? 8 : 4;  // rows of a tile: with three vectors each, what registers hold

struct Layer {
  const T* gates;    // [steps, batch, 3 hidden]
  const T* weight;   // packed, see below
  const T* bias;     // b_hn [hidden], or null
  const T* first;    // h_0 [batch, hidden]
  T* out;            // [steps, batch, hidden]
  int64_t steps, batch, hidden;
  bool reverse;
};

// W_hh [3 hidden, hidden] as [columns / N][hidden][3][N]: in the order in which it is read.
void pack(const T* weight, int64_t hidden, T* packed) {
  for (int64_t column = 0; column < hidden; column += N)
    for (int64_t gate = 0; gate < 3; ++gate)
      for (int64_t lane = 0; lane < N; ++lane) {
        T* to = packed + column * hidden * 3 + gate * N + lane;
        if (column + lane >= hidden) {
          for (int64_t k = 0; k < hidden; ++k) to[k * 3 * N] = 0;
          continue;
        }
        const T* from = weight + (gate * hidden + column + lane) * hidden;
        for (int64_t k = 0; k < hidden; ++k) to[k * 3 * N] = from[k];
      }
}

inline V sigmoid(V x) { return V(T(1)) / (V(T(1)) + x.neg().exp()); }

// Rows of the state times N columns of all three gates, then the gates.
template <int rows, int sums>
inline void tile(const Layer& l, const T* gates, const T* before, T* after, int64_t column) {
  const int64_t hidden = l.hidden, count = std::min(N, hidden - column);
  const V bias = l.bias ? V::loadu(l.bias + column, count) : V(T(0));
  product<rows, 3, sums>(before, l.weight + column * hidden * 3, hidden, [&](int row, const V* sum) {
    const T* x = gates + row * 3 * hidden + column;
    const V r = sigmoid(V::loadu(x, count) + sum[0]);
    const V z = sigmoid(V::loadu(x + hidden, count) + sum[1]);
    const V n = (V::loadu(x + 2 * hidden, count) + r * (sum[2] + bias)).tanh();
    const V h = V::loadu(before + row * hidden + column, count);
    (n + z * (h - n)).store(after + row * hidden + column, count);
  });
}

// One step for the rows and columns [begin, end).
void step(const Layer& l, int64_t t, int64_t row, int64_t last_row, int64_t column, int64_t last_column) {
  const int64_t size = l.batch * l.hidden;
  const bool begins = l.reverse ? t == l.steps - 1 : t == 0;
  const T* before = begins ? l.first : l.out + (l.reverse ? t + 1 : t - 1) * size;
  T* after = l.out + t * size;
  const T* gates = l.gates + t * 3 * size;
  for (; column < last_column; column += N) {
    int64_t i = row;
    auto rest = [&](int64_t wanted) { return last_row - i >= wanted; };
    auto at = [&](auto of_tile, int64_t height) {
      of_tile(l, gates + i * 3 * l.hidden, before + i * l.hidden, after + i * l.hidden, column);
      i += height;
    };
    while (rest(kTall)) at(tile<kTall, 1>, kTall);
    if constexpr (kTall > 4)
      if (rest(4)) at(tile<4, 2>, 4);
    if (rest(2)) at(tile<2, 2>, 2);
    if (rest(1)) at(tile<1, 4>, 1);
  }
}

void run(const Layer& l, int threads) {
  const int64_t columns = (l.hidden + N - 1) / N;
  // Operations of a step below which meeting after it costs more than it saves.
  constexpr int64_t kShort = 200000;
  const bool by_rows = l.batch >= threads;
  if (!by_rows && l.batch * l.hidden * l.hidden * 6 < kShort) threads = 1;
  auto from = [&](int64_t whole, int64_t part) { return whole * part / threads; };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team;
    for (int64_t i = 0; i < l.steps; ++i) {
      const int64_t t = l.reverse ? l.steps - 1 - i : i;
      for (int64_t part = team.me; part < threads; part += team.present) {
        if (by_rows)
          step(l, t, from(l.batch, part), from(l.batch, part + 1), 0, l.hidden);
        else
          step(l, t, 0, l.batch, from(columns, part) * N, std::min(from(columns, part + 1) * N, l.hidden));
      }
      if (!by_rows && threads > 1) {
#pragma omp barrier
      }
    }
  }
}

}  // namespace

// All tensors contiguous; bias may be null.
HIGHWAY_EXPORT void highway_gru(const T* gates, const T* weight, const T* bias, const T* first, T* out, int64_t steps,
                                int64_t batch, int64_t hidden, int reverse, int threads) {
  const int64_t columns = (hidden + N - 1) / N * N;
  std::vector<T> packed(columns * hidden * 3);
  pack(weight, hidden, packed.data());
  run({gates, packed.data(), bias, first, out, steps, batch, hidden, reverse != 0}, std::max(threads, 1));
}
