// Substitution inside the segments of a recurrent layer on a CPU, all steps of a run in one call; with one segment as
// long as the sequence it is exact backprop from state to state. Built once for each dtype that is used, with
// HIGHWAY_TYPE defined as float or double.
//
//     GRU, RNN    w' = c + m w + (p w) W
//     LSTM        h' = c + (p_i e, p_f e, p_g e, p_o h) W        e' = m e + q h'
//
// Row t of a series leads from the state after step t to the state before it; c and q are those of the state before
// (see runs.py). A step is too little work for a call of a matrix library and one call each for what surrounds it; here
// the products of a few rows and columns stay in registers (product.h) until the next state is made of them.
//
// Note [Who computes what]
// A sequence of the batch in a segment is a recurrence of its own: threads that share these rows out never wait for one
// another. Only where there are fewer rows than threads, and a step is long, do they share out the columns and meet
// after every step.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kWide = 2 * N;                 // columns of a tile
constexpr int kTall = kRegisters == 32 ? 12 : 6; // rows of a tile: with two vectors each, what registers hold
constexpr int64_t kBlock = 72;                   // rows that go from step to step together

struct Layer {
  const T* values;       // c [T, B, H]
  const T* multipliers;  // m [T, B, H], or null for zeros
  const T* through;      // q [T, B, H] of an LSTM, else null
  const T* into;         // p [T, B, gates, H], `stride` numbers from one sequence to the next
  const T* weight;       // packed, see below
  const T* ends[2];      // [lanes, B, H]: the states each lane starts from, per component
  T* rows[2];            // [T, B, H] where a run keeps every state, else null
  T* out[2];             // [B, H] of the first lane where it does, else [lanes, B, H]
  int64_t stride, steps, batch, hidden, gates, segment;
  int64_t first, skipped, lanes;  // links of the first segment; segments that are passed over, and those that are not
  int components;

  bool whole() const { return rows[0] != nullptr; }
  int64_t width() const { return gates * hidden; }
};

// W [gates H, H] as [panels of kWide columns][gates H][kWide]: in the order in which it is read.
void pack(const T* weight, int64_t depth, int64_t hidden, T* packed) {
  for (int64_t column = 0; column < hidden; column += kWide) {
    const int64_t count = std::min(kWide, hidden - column);
    for (int64_t k = 0; k < depth; ++k, packed += kWide) {
      std::copy_n(weight + k * hidden + column, count, packed);
      std::fill(packed + count, packed + kWide, T(0));
    }
  }
}

// One link of one sequence: the states after and before it, and what lies there.
struct Link {
  const T* from[2];
  T* to[2];
  const T *value, *multiplier, *through, *into;  // value, through: null before the first state
};

// N columns of the state before a link, from what has come through the weights.
inline void finish(const Layer& l, const Link& link, V h, int64_t column) {
  const int64_t count = std::min(N, l.hidden - column);
  if (link.value) h = h + V::loadu(link.value + column, count);
  V kept(T(0));
  if (link.multiplier)
    kept = V::loadu(link.multiplier + column, count) * V::loadu(link.from[l.components - 1] + column, count);
  if (l.components == 1) {
    (h + kept).store(link.to[0] + column, count);
    return;
  }
  h.store(link.to[0] + column, count);
  if (link.through) kept = at::vec::fmadd(V::loadu(link.through + column, count), h, kept);
  kept.store(link.to[1] + column, count);
}

template <int rows, int sums>
inline void tile(const Layer& l, const Link* links, const T* gates, int64_t column) {
  product<rows, 2, sums>(gates, l.weight + column * l.width(), l.width(), [&](int row, const V* sum) {
    finish(l, links[row], sum[0], column);
    if (column + N < l.hidden) finish(l, links[row], sum[1], column + N);
  });
}

// What goes into the product: p times the state, of an LSTM the first three gates' times the second component.
void into_gates(const Layer& l, const Link& link, T* gates) {
  for (int64_t gate = 0; gate < l.gates; ++gate) {
    const T *p = link.into + gate * l.hidden, *w = link.from[l.components == 2 && gate < 3 ? 1 : 0];
    T* g = gates + gate * l.hidden;
    int64_t i = 0;
    for (; i + N <= l.hidden; i += N) (V::loadu(p + i) * V::loadu(w + i)).store(g + i);
    for (; i < l.hidden; ++i) g[i] = p[i] * w[i];
  }
}

void step(const Layer& l, const Link* links, int64_t count, T* gates, int64_t column, int64_t last_column) {
  for (int64_t i = 0; i < count; ++i) into_gates(l, links[i], gates + i * l.width());
  for (; column < last_column; column += kWide) {
    int64_t i = 0;
    auto at = [&](auto of_tile, int64_t height) {
      of_tile(l, links + i, gates + i * l.width(), column);
      i += height;
    };
    while (count - i >= kTall) at(tile<kTall, 1>, kTall);
    if constexpr (kTall > 6)
      if (count - i >= 6) at(tile<6, 2>, 6);
    if (count - i >= 4) at(tile<4, 1>, 4);
    if (count - i >= 2) at(tile<2, 2>, 2);
    if (count - i >= 1) at(tile<1, 4>, 1);
  }
}

// Step `number` of rows [begin, end), as links; `scratch` [2, components, end - begin, H] has the states of a run that
// keeps none.
int64_t links_of(const Layer& l, int64_t number, int64_t begin, int64_t end, T* scratch, Link* links) {
  const int64_t size = l.batch * l.hidden;
  int64_t count = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t lane = row / l.batch, sequence = row % l.batch, segment = lane + l.skipped;
    // The first link's step leads out of the series; no other lane of a run that keeps its states leaves its segment.
    const int64_t length = segment ? l.segment : l.first;
    const int64_t last = l.whole() && segment ? length - 1 : length;
    if (number >= last) continue;
    const int64_t t = l.first - 1 + segment * l.segment - number;
    const int64_t within = sequence * l.hidden, here = t * size + within, before = here - size;
    Link& link = links[count++];
    link.value = t ? l.values + before : nullptr;
    link.through = t && l.through ? l.through + before : nullptr;
    link.multiplier = l.multipliers ? l.multipliers + here : nullptr;
    link.into = l.into + (t * l.batch + sequence) * l.stride;
    for (int c = 0; c < l.components; ++c) {
      auto stored = [&](int64_t turn) {
        return scratch + ((turn % 2 * l.components + c) * (end - begin) + row - begin) * l.hidden;
      };
      link.from[c] = number == 0 ? l.ends[c] + row * l.hidden : l.whole() ? l.rows[c] + here : stored(number);
      const bool leaves = number + 1 == length;
      link.to[c] = leaves ? l.out[c] + row * l.hidden : l.whole() ? l.rows[c] + before : stored(number + 1);
    }
  }
  return count;
}

void run(const Layer& l, int threads) {
  const int64_t rows = l.lanes * l.batch, panels = (l.hidden + kWide - 1) / kWide;
  const int64_t of_step = 2 * rows * l.width() * l.hidden;  // operations
  // Below these, threads cost more than they save: of a whole run, and of a step after which they meet.
  constexpr int64_t kLittle = 1000000, kShort = 200000;
  if (rows >= threads ? of_step * l.segment < kLittle : of_step < kShort) threads = 1;
  const bool by_rows = rows >= threads;
  auto from = [&](int64_t whole, int64_t part) { return whole * part / threads; };
  const int64_t most = by_rows ? std::min(kBlock, rows) : rows;
  const int64_t held = l.whole() ? 0 : 2 * l.components * most * l.hidden;
  std::vector<T> scratch(held * (by_rows ? threads : 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team;
    std::vector<T> gates(most * l.width());
    std::vector<Link> links(most);
    if (by_rows) {
      for (int64_t part = team.me; part < threads; part += team.present)
        for (int64_t row = from(rows, part), last = from(rows, part + 1); row < last; row += kBlock)
          for (int64_t number = 0; number < l.segment; ++number) {
            T* mine = scratch.data() + part * held;
            const int64_t count = links_of(l, number, row, std::min(row + kBlock, last), mine, links.data());
            step(l, links.data(), count, gates.data(), 0, l.hidden);
          }
    } else {
      for (int64_t number = 0; number < l.segment; ++number) {
        const int64_t count = links_of(l, number, 0, rows, scratch.data(), links.data());
        for (int64_t part = team.me; part < threads; part += team.present)
          step(l, links.data(), count, gates.data(), from(panels, part) * kWide,
               std::min(from(panels, part + 1) * kWide, l.hidden));
#pragma omp barrier
      }
    }
  }
}

}  // namespace

// All tensors contiguous but `into`; multipliers, and what belongs to a second component, may be null. `rows` are null
// in a run that passes the first segment over and keeps no states.
HIGHWAY_EXPORT void highway_run(const T* values, const T* multipliers, const T* through, const T* into, const T* weight,
                                const T* end_h, const T* end_e, T* rows_h, T* rows_e, T* out_h, T* out_e,
                                int64_t stride, int64_t steps, int64_t batch, int64_t hidden, int64_t gates,
                                int64_t segment, int threads) {
  const int64_t depth = gates * hidden, count = (steps + segment - 1) / segment;
  std::vector<T> packed((hidden + kWide - 1) / kWide * kWide * depth);
  pack(weight, depth, hidden, packed.data());
  const int64_t skipped = rows_h ? 0 : 1, first = steps - (count - 1) * segment;
  const Layer l{values, multipliers, through, into, packed.data(), {end_h, end_e}, {rows_h, rows_e}, {out_h, out_e},
                stride, steps, batch, hidden, gates, std::min(segment, steps), first, skipped, count - skipped,
                end_e ? 2 : 1};
  for (int c = 0; c < l.components && l.whole(); ++c)
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t t = first - 1 + lane * segment;
      std::copy_n(l.ends[c] + lane * batch * hidden, batch * hidden, l.rows[c] + t * batch * hidden);
    }
  run(l, std::max(threads, 1));
}
