// The CPU kernel of highway::linear_scan: u[i] = a[i] + m[i] * u[i -+ 1] along dim 0, in one pass over memory.
// Built once for each dtype that is used, with HIGHWAY_TYPE defined as one of float, double, Half, BFloat16,
// Complex<float>, Complex<double>. With an initial state the output has one more row, that state, before the first link.
//
// Note [Row order]
// A thread owns a range of columns and walks down the rows with the running u of its columns in a small buffer
// that stays in the cache. Going down one narrow column block at a time instead touches a new page, and with
// power-of-two rows the same cache set, at every step; row order reads and writes whole pages one after another.
// The running u is kept apart from the output, so the output can be written past the caches, and 16-bit types
// carry float32 from row to row.
//
// Note [Few columns]
// Threads that share short rows hinder one another: each fetches, ahead of its columns, those of the next. Where
// rows are too short for all threads, a scan of many rows is cut into one block of rows per thread: every block
// is reduced on its own to (value, product of multipliers), the carries are passed from block to block, and every
// block is scanned again from its true carry. This reads the inputs twice.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// ---- numbers -----------------------------------------------------------------------------------------------

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// std::complex multiplies with a special-case check for infinities on every product.
template <typename R>
struct Complex {
  R re, im;
  friend inline Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
  friend inline Complex operator*(Complex x, Complex y) {
    return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
  }
};

template <typename A> inline A number(double x) { return static_cast<A>(x); }
template <> inline Complex<float> number(double x) { return {static_cast<float>(x), 0.0f}; }
template <> inline Complex<double> number(double x) { return {x, 0.0}; }

inline bool finite(float x) { return std::isfinite(x); }
inline bool finite(double x) { return std::isfinite(x); }
template <typename R> inline bool finite(Complex<R> x) { return std::isfinite(x.re) && std::isfinite(x.im); }

// The type a scan of T accumulates in.
template <typename T> struct Accumulator { using type = T; };
template <> struct Accumulator<Half> { using type = float; };
template <> struct Accumulator<BFloat16> { using type = float; };

inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline BFloat16 narrow_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;                    // rounding could carry a NaN into infinity
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

inline float widen(Half x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu);
  uint32_t bits;
  float y;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {  // subnormal: rest * 2^-24
    y = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign ? -y : y;
  }
  std::memcpy(&y, &bits, 4);
  return y;
}

inline Half narrow_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t rest = bits & 0x7fffffffu;
  uint32_t out;
  if (rest > 0x7f800000u) {
    out = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to more than the largest half
    out = 0x7c00u;
  } else if (rest >= 0x38800000u) {
    out = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  } else {  // subnormal: the float addition of 0.5 does the rounding at 2^-24
    float y;
    std::memcpy(&y, &rest, 4);
    y += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &y, 4);
    out = shifted - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | out)};
}

template <typename A> inline A read(const A& x) { return x; }
#if defined(__F16C__)
inline float read(const Half& x) { return _cvtsh_ss(x.bits); }
#else
inline float read(const Half& x) { return widen(x); }
#endif
inline float read(const BFloat16& x) { return widen(x); }
template <typename A> inline void write(A* y, A x) { *y = x; }
#if defined(__F16C__)
inline void write(Half* y, float x) { y->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline void write(Half* y, float x) { *y = narrow_half(x); }
#endif
inline void write(BFloat16* y, float x) { *y = narrow_bfloat16(x); }

// ---- vectors of numbers ------------------------------------------------------------------------------------

// A vector of accumulators: 32 bytes where the compiler has such types (it cuts them up for smaller machines),
// else a single number.
#if defined(__GNUC__)
template <typename A> struct Lanes { using type = A; static constexpr int64_t count = 1; };
template <> struct Lanes<float> {
  typedef float type __attribute__((vector_size(32)));
  static constexpr int64_t count = 8;
};
template <> struct Lanes<double> {
  typedef double type __attribute__((vector_size(32)));
  static constexpr int64_t count = 4;
};
typedef Lanes<float>::type Floats;
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));
#else
template <typename A> struct Lanes { using type = A; static constexpr int64_t count = 1; };
#endif

template <typename V, typename P>
inline V load_bytes(const P* x) {
  V v;
  std::memcpy(&v, x, sizeof(V));
  return v;
}

// Bytes written past the caches have to be aligned to their own number.
template <bool Stream, typename V, typename P>
inline void store_bytes(P* y, V v) {
#if defined(__AVX__)
  if constexpr (Stream && sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(y), load_bytes<__m256i>(&v));
    return;
  } else if constexpr (Stream && sizeof(V) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(y), load_bytes<__m128i>(&v));
    return;
  }
#endif
  std::memcpy(y, &v, sizeof(V));
}

template <typename A> inline typename Lanes<A>::type load(const A* x) {
  return load_bytes<typename Lanes<A>::type>(x);
}
template <bool Stream, typename A> inline void store(A* y, typename Lanes<A>::type v) {
  store_bytes<Stream>(y, v);
}

#if defined(__GNUC__)
inline Floats load(const BFloat16* x) {
  return load_bytes<Floats>(&static_cast<const Words&>(__builtin_convertvector(load_bytes<Shorts>(x), Words) << 16));
}

template <bool Stream> inline void store(BFloat16* y, Floats v) {
  const Words bits = load_bytes<Words>(&v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);  // all ones where it holds
  store_bytes<Stream>(y, __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Shorts));
}

inline Floats load(const Half* x) {
#if defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load_bytes<__m128i>(x));
#else
  Floats v;
  for (int l = 0; l < 8; ++l) v[l] = widen(x[l]);
  return v;
#endif
}

template <bool Stream> inline void store(Half* y, Floats v) {
#if defined(__F16C__)
  store_bytes<Stream>(y, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int l = 0; l < 8; ++l) y[l] = narrow_half(v[l]);
#endif
}
#else
inline float load(const Half* x) { return read(*x); }
inline float load(const BFloat16* x) { return read(*x); }
template <bool Stream> inline void store(Half* y, float v) { write(y, v); }
template <bool Stream> inline void store(BFloat16* y, float v) { write(y, v); }
#endif

// ---- one row -----------------------------------------------------------------------------------------------

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kTile = 16384;  // columns whose running u a thread keeps at a time, in L2
constexpr int64_t kFew = 7;      // columns up to which the work of a row is too little for any bookkeeping

enum class Multiplier { none, scalar, full };
// What a pass over the rows leaves behind: the output, written through the caches or past them, or in a reduction
// the product of the multipliers.
enum class Result { output, streamed_output, product };

// u = a + m * u for columns that lie next to each other, and y = u or p = m * p.
template <typename T, typename A, Multiplier M, Result R>
inline void step(const T* a, const T* m, A* u, A* p, T* y, int64_t n) {
  using V = typename Lanes<A>::type;
  constexpr int64_t W = Lanes<A>::count;
  const A scalar = M == Multiplier::scalar ? read(*m) : A{};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    V v = load(u + j);
    if constexpr (M == Multiplier::none) v = load(a + j) + v;
    if constexpr (M == Multiplier::scalar) v = load(a + j) + scalar * v;
    if constexpr (M == Multiplier::full) v = load(a + j) + load(m + j) * v;
    store<false>(u + j, v);
    if constexpr (R != Result::product) store<R == Result::streamed_output>(y + j, v);
    else if constexpr (M == Multiplier::scalar) store<false>(p + j, scalar * load(p + j));
    else if constexpr (M == Multiplier::full) store<false>(p + j, load(m + j) * load(p + j));
  }
  for (; j < n; ++j) {
    const A k = M == Multiplier::full ? read(m[j]) : scalar;
    u[j] = M == Multiplier::none ? read(a[j]) + u[j] : read(a[j]) + k * u[j];
    if constexpr (R != Result::product) write(y + j, u[j]);
    else if constexpr (M != Multiplier::none) p[j] = k * p[j];
  }
}

// ---- the scan ----------------------------------------------------------------------------------------------

constexpr int kMaxDims = 8;

// Rows in scan order; columns are `outer` index dimensions around runs of `run` neighbours.
template <typename T>
struct Problem {
  const T* a;
  const T* m;       // null: every multiplier is one
  const T* initial; // the state before the first link, its columns next to each other; null: there is none
  T* y;             // the first link's row; the initial state's is the one before
  int64_t length, columns, run;
  int64_t a_row, m_row, y_row;  // elements from one row to the next in scan order
  int outer;
  int64_t size[kMaxDims], a_stride[kMaxDims], m_stride[kMaxDims];
  bool stream;
};

struct Run { int64_t a, m, y, u, n; };  // offsets into a row of a, m, y and into the running values; columns

// Cuts columns [begin, end) into runs of neighbours.
template <typename T>
void cut(const Problem<T>& p, Multiplier kind, int64_t begin, int64_t end, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t at = begin; at < end;) {
    const int64_t within = at % p.run;
    int64_t index = at / p.run, a = within, m = kind == Multiplier::full ? within : 0;
    for (int d = p.outer - 1; d >= 0; --d) {
      a += index % p.size[d] * p.a_stride[d];
      m += index % p.size[d] * p.m_stride[d];
      index /= p.size[d];
    }
    const int64_t n = std::min(p.run - within, end - at);
    runs.push_back({a, m, at, at - begin, n});
    at += n;
  }
}

template <typename T, typename A, Multiplier M>
struct Scan {
  const Problem<T>& p;
  std::vector<Run> runs;

  explicit Scan(const Problem<T>& problem) : p(problem) {}

  // Rows [first, last) of the runs, from running values u, which are updated; writes the output.
  void rows(int64_t first, int64_t last, A* u) {
    if (first == 0) start(u, first);
    if (p.stream) pass<Result::streamed_output>(first, last, u, nullptr);
    else pass<Result::output>(first, last, u, nullptr);
#if defined(__AVX__)
    if (p.stream) _mm_sfence();
#endif
  }

  // The same rows with no output that matters; also multiplies their multipliers into product.
  void reduce(int64_t first, int64_t last, A* u, A* product) {
    if (first == 0) start(u, first);
    pass<Result::product>(first, last, u, product);
  }

 private:
  // Without an initial state the first link of the whole scan has no predecessor, and is the state to start from. Its
  // multiplier must not meet a zero there, or an infinite one would make a NaN.
  void start(A* u, int64_t& first) {
    for (const Run& r : runs)
      for (int64_t j = 0; j < r.n; ++j) {
        u[r.u + j] = read(p.initial ? p.initial[r.y + j] : p.a[r.a + j]);
        write((p.initial ? p.y - p.y_row : p.y) + r.y + j, u[r.u + j]);
      }
    if (!p.initial) ++first;
  }

  template <Result R>
  void pass(int64_t first, int64_t last, A* u, A* product) {
    if constexpr (R != Result::streamed_output)
      if (runs.size() == 1 && runs[0].n <= kFew)
        return runs[0].n == 1 ? few<R, 1>(first, last, u, product) : few<R, 0>(first, last, u, product);
    for (int64_t i = first; i < last; ++i) {
      const T* a = p.a + i * p.a_row;
      const T* m = M == Multiplier::none ? nullptr : p.m + i * p.m_row;
      T* y = p.y + i * p.y_row;
      for (const Run& r : runs)
        step<T, A, M, R>(a + r.a, m + r.m, u + r.u, R == Result::product ? product + r.u : nullptr, y + r.y, r.n);
    }
  }

  // A single run of at most kFew columns, N if that is not zero, with the running values in registers.
  template <Result R, int N>
  void few(int64_t first, int64_t last, A* u, A* product) {
    const Run r = runs[0];
    const int64_t n = N ? N : r.n;
    A v[kFew], q[kFew];
    for (int64_t j = 0; j < n; ++j) {
      v[j] = u[j];
      if (R == Result::product) q[j] = product[j];
    }
    for (int64_t i = first; i < last; ++i) {
      const T* a = p.a + i * p.a_row + r.a;
      const T* m = M == Multiplier::none ? nullptr : p.m + i * p.m_row + r.m;
      T* y = p.y + i * p.y_row + r.y;
      for (int64_t j = 0; j < n; ++j) {
        if constexpr (M == Multiplier::none) {
          v[j] = read(a[j]) + v[j];
        } else {
          const A k = read(m[M == Multiplier::scalar ? 0 : j]);
          v[j] = read(a[j]) + k * v[j];
          if constexpr (R == Result::product) q[j] = k * q[j];
        }
        if constexpr (R != Result::product) write(y + j, v[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      u[j] = v[j];
      if (R == Result::product) product[j] = q[j];
    }
  }
};

template <typename T, typename A, Multiplier M>
void by_columns(const Problem<T>& p, int threads) {
  const int64_t per_line = kLine / static_cast<int64_t>(sizeof(T));
  const int64_t lines = (p.columns + per_line - 1) / per_line;
  auto work = [&](int thread) {
    const int64_t begin = std::min(p.columns, lines * thread / threads * per_line);
    const int64_t end = std::min(p.columns, lines * (thread + 1) / threads * per_line);
    std::vector<A> u(std::min(kTile, end - begin));
    Scan<T, A, M> scan(p);
    for (int64_t tile = begin; tile < end; tile += kTile) {
      cut(p, M, tile, std::min(tile + kTile, end), scan.runs);
      scan.rows(0, p.length, u.data());
    }
  };
  if (threads == 1) return work(0);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) work(thread);
}

// See Note [Few columns]. Returns false, having written nothing that matters, where a product of multipliers or a
// carry overflows: infinity times zero is no number, while the plain scan has a finite state, or an infinite one.
template <typename T, typename A, Multiplier M>
bool by_blocks(const Problem<T>& p, int blocks) {
  const int64_t columns = p.columns;
  std::vector<A> last(blocks * columns, A{}), product(blocks * columns, number<A>(1)), carry(blocks * columns);
#pragma omp parallel for num_threads(blocks) schedule(static, 1)
  for (int b = 0; b < blocks - 1; ++b) {
    Scan<T, A, M> scan(p);
    cut(p, M, 0, columns, scan.runs);
    scan.reduce(p.length * b / blocks, p.length * (b + 1) / blocks, &last[b * columns], &product[b * columns]);
  }
  std::copy(last.begin(), last.begin() + columns, carry.begin() + columns);
  for (int64_t j = columns; j < (blocks - 1) * columns; ++j) {
    if (!finite(product[j]) || !finite(carry[j])) return false;
    carry[j + columns] = last[j] + product[j] * carry[j];
  }
#pragma omp parallel for num_threads(blocks) schedule(static, 1)
  for (int b = 0; b < blocks; ++b) {
    Scan<T, A, M> scan(p);
    cut(p, M, 0, columns, scan.runs);
    scan.rows(p.length * b / blocks, p.length * (b + 1) / blocks, &carry[b * columns]);
  }
  return true;
}

template <typename T, Multiplier M>
void run(const Problem<T>& p, int threads) {
  using A = typename Accumulator<T>::type;
  constexpr int64_t kGrain = 32768;  // elements worth a thread
  constexpr int64_t kPage = 4096;    // bytes of a row worth a thread: prefetchers follow whole pages
  constexpr int64_t kBlock = 64;     // rows worth a block
  const int64_t most = std::clamp<int64_t>(p.length * p.columns / kGrain, 1, threads);
  const int64_t sharing_rows = std::clamp<int64_t>(p.columns * sizeof(T) / kPage, 1, most);
  const int64_t blocks = std::min(most, p.length / kBlock);
  // Blocks read the inputs twice, and so have to be many more than the threads they keep busy otherwise.
  if (blocks >= 3 * sharing_rows && by_blocks<T, A, M>(p, static_cast<int>(blocks))) return;
  by_columns<T, A, M>(p, static_cast<int>(sharing_rows));
}

// ---- from Python -------------------------------------------------------------------------------------------

struct Layout {
  int dims = 0;
  int64_t size[kMaxDims], a[kMaxDims], m[kMaxDims];
};

// Reads the column dimensions, drops those of size one, and merges neighbours that lie next to each other in
// both inputs. False: too many dimensions remain, or the last one is not contiguous.
bool read_layout(PyObject* sizes, PyObject* a_strides, PyObject* m_sizes, PyObject* m_strides, Layout& out) {
  const Py_ssize_t rank = PyTuple_GET_SIZE(sizes);
  const Py_ssize_t m_rank = m_sizes == Py_None ? 0 : PyTuple_GET_SIZE(m_sizes);
  for (Py_ssize_t d = 1; d < rank; ++d) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, d));
    const int64_t a = PyLong_AsLongLong(PyTuple_GET_ITEM(a_strides, d));
    const bool spread = d >= m_rank || PyLong_AsLongLong(PyTuple_GET_ITEM(m_sizes, d)) == 1;
    const int64_t m = spread ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(m_strides, d));
    if (size == 1) continue;
    const int e = out.dims - 1;
    if (e >= 0 && out.a[e] == size * a && out.m[e] == size * m) {
      out.size[e] *= size;
      out.a[e] = a;
      out.m[e] = m;
    } else {
      if (out.dims == kMaxDims) return false;
      out.size[out.dims] = size;
      out.a[out.dims] = a;
      out.m[out.dims] = m;
      ++out.dims;
    }
  }
  if (out.dims == 0) {
    out.dims = 1;
    out.size[0] = 1;
    out.a[0] = 1;
    out.m[0] = 0;
  }
  const int e = out.dims - 1;
  return out.a[e] == 1 && (out.m[e] == 0 || out.m[e] == 1);
}

using T = HIGHWAY_TYPE;

void scan(const void* a, const void* m, const void* initial, void* y, int64_t length, int64_t a_row, int64_t m_row,
          const Layout& layout, bool reverse, int threads) {
  constexpr int64_t kStreamBytes = 1 << 20;       // smaller outputs are still in the cache when they are read
  constexpr int64_t kFreshBytes = 32 << 20;       // malloc maps anything larger anew, page by page
  Problem<T> p;
  p.length = length;
  p.outer = layout.dims - 1;
  p.run = layout.size[p.outer];
  p.columns = p.run;
  for (int d = 0; d < p.outer; ++d) {
    p.size[d] = layout.size[d];
    p.a_stride[d] = layout.a[d];
    p.m_stride[d] = layout.m[d];
    p.columns *= p.size[d];
  }
  const int64_t sign = reverse ? -1 : 1, first = reverse ? length - 1 : 0;
  p.a = static_cast<const T*>(a) + first * a_row;
  p.m = m ? static_cast<const T*>(m) + first * m_row : nullptr;
  p.initial = static_cast<const T*>(initial);
  p.y = static_cast<T*>(y) + (first + (initial && !reverse)) * p.columns;
  p.a_row = sign * a_row;
  p.m_row = sign * m_row;
  p.y_row = sign * p.columns;
  const int64_t bytes = length * p.columns * static_cast<int64_t>(sizeof(T));
  p.stream = bytes >= kStreamBytes && p.columns > kFew && p.run * static_cast<int64_t>(sizeof(T)) % kLine == 0 &&
             reinterpret_cast<uintptr_t>(y) % kLine == 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Half the time of a large scan is the kernel handing out the output's pages; ask for large ones.
  if (bytes >= kFreshBytes) {
    constexpr uintptr_t huge = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(y) + huge - 1) & ~(huge - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(y) + bytes) & ~(huge - 1);
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  if (!m) return run<T, Multiplier::none>(p, threads);
  if (layout.m[p.outer] == 0) return run<T, Multiplier::scalar>(p, threads);
  return run<T, Multiplier::full>(p, threads);
}

// linear_scan(a, m, initial, y, sizes, a_strides, m_sizes, m_strides, reverse, threads) -> bool
// Pointers as integers, m = 0 and initial = 0 for none; m_sizes and m_strides are None or tuples whose missing dimensions
// count as size one. False: a layout this kernel does not take, nothing was computed.
PyObject* linear_scan(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 10) {
    PyErr_SetString(PyExc_TypeError, "linear_scan takes 10 arguments");
    return nullptr;
  }
  const void* a = PyLong_AsVoidPtr(args[0]);
  const void* m = PyLong_AsVoidPtr(args[1]);
  const void* initial = PyLong_AsVoidPtr(args[2]);
  void* y = PyLong_AsVoidPtr(args[3]);
  PyObject *sizes = args[4], *a_strides = args[5], *m_sizes = args[6], *m_strides = args[7];
  Layout layout;
  const bool taken = read_layout(sizes, a_strides, m_sizes, m_strides, layout);
  const int64_t length = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, 0));
  const int64_t a_row = PyLong_AsLongLong(PyTuple_GET_ITEM(a_strides, 0));
  const bool steady = m_sizes == Py_None || PyTuple_GET_SIZE(m_sizes) == 0 ||
                      PyLong_AsLongLong(PyTuple_GET_ITEM(m_sizes, 0)) == 1;
  const int64_t m_row = steady ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(m_strides, 0));
  const bool reverse = args[8] == Py_True;
  const int threads = static_cast<int>(PyLong_AsLong(args[9]));
  if (PyErr_Occurred()) return nullptr;
  if (!taken) Py_RETURN_FALSE;
  Py_BEGIN_ALLOW_THREADS
  scan(a, m, initial, y, length, a_row, m_row, layout, reverse, threads);
  Py_END_ALLOW_THREADS
  Py_RETURN_TRUE;
}

PyMethodDef method = {"linear_scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(linear_scan)),
                      METH_FASTCALL, nullptr};

}  // namespace

// Hands the function to Python; called once with the interpreter lock held.
#if defined(_WIN32)
extern "C" __declspec(dllexport) PyObject* highway_linear_scan() { return PyCFunction_New(&method, nullptr); }
#else
extern "C" PyObject* highway_linear_scan() { return PyCFunction_New(&method, nullptr); }
#endif
