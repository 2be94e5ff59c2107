// The large parts of a boundary of hyper-connections for CPUs: what boundary_blocks.py does, one pass over the streams.
//
// Dims: T tokens, N streams, D width of one stream, R parts read and written, C = R D. Row-major, contiguous.
// Everything is computed in fp32; streams, outputs and their gradients are fp32 or bf16 (Scalar). Sums over a token are
// kept in vectors of W lanes, those over tokens in one partial result per chunk of tokens, so that the results do not
// depend on the number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
constexpr int W = 16;
constexpr int MAX_STREAMS = 8;
constexpr int64_t CHUNK = 128;  // tokens per partial result
typedef float Vec __attribute__((vector_size(W * sizeof(float))));

inline Vec zero() { return Vec{}; }

inline float sum(Vec v) {
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += v[lane];
  return total;
}

inline float widen(float x) { return x; }
inline float widen(c10::BFloat16 x) { return static_cast<float>(x); }
inline float rounded(float x, float) { return x; }
inline float rounded(float x, c10::BFloat16) { return static_cast<float>(c10::BFloat16(x)); }

// `count` < W only at the end of a row; missing lanes are 0 and are not stored.
inline Vec load(const float* p, int64_t count = W) {
  Vec v{};
  if (count == W) std::memcpy(&v, p, sizeof(Vec));
  else for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}
inline Vec load(const c10::BFloat16* p, int64_t count = W) {
  alignas(64) float wide[W] = {};
  for (int lane = 0; lane < count; ++lane) wide[lane] = widen(p[lane]);
  return load(wide);
}
inline void store(float* p, Vec v, int64_t count = W) {
  if (count == W) std::memcpy(p, &v, sizeof(Vec));
  else for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
}
inline void store(c10::BFloat16* p, Vec v, int64_t count = W) {
  for (int lane = 0; lane < count; ++lane) p[lane] = c10::BFloat16(v[lane]);
}
// What a store of v leaves behind.
inline Vec as_stored(Vec v, const float*) { return v; }
inline Vec as_stored(Vec v, const c10::BFloat16*) {
  for (int lane = 0; lane < W; ++lane) v[lane] = rounded(v[lane], c10::BFloat16());
  return v;
}

// f(d, count) for every vector of a row of D numbers
template <typename F>
inline void each_vector(int64_t D, F f) {
  int64_t d = 0;
  for (; d + W <= D; d += W) f(d, int64_t(W));
  if (d < D) f(d, D - d);
}

// The next token's rows, into the second cache: rows are too short for the processor's own prefetching to settle on.
template <typename S>
inline void prefetch(const S* p) { __builtin_prefetch(p, 0, 2); }

// Calls f with N as a constant, so that loops over streams are unrolled and sums stay in registers.
template <typename F>
void with_streams(int64_t N, F f) {
  switch (N) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    case 8: return f(std::integral_constant<int, 8>());
    default: TORCH_CHECK(false, "1 to ", MAX_STREAMS, " streams, not ", N);
  }
}

template <typename F>
void with_scalar(const Tensor& streams, F f) {
  if (streams.scalar_type() == at::kBFloat16) return f(c10::BFloat16());
  TORCH_CHECK(streams.scalar_type() == at::kFloat, "streams in float32 or bfloat16, not ", streams.scalar_type());
  f(float());
}

template <typename F>
void each_chunk(int64_t T, F f) {
  int64_t chunks = (T + CHUNK - 1) / CHUNK;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView guard;  // which the calling thread has, and another one has not
    for (int64_t c = first; c < last; ++c) f(c, c * CHUNK, std::min(T, (c + 1) * CHUNK));
  });
}

Tensor same(const Tensor& t) { return t.contiguous(); }
Tensor same(const std::optional<Tensor>& t) { return t.has_value() ? t->contiguous() : Tensor(); }
template <typename S>
S* data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<S>() : nullptr; }

// H' of one token; squares and sums of its rows to `statistics` [N][2] where asked for.
template <typename S, int N>
void fold_token(const S* streams, const S* output, const float* write, const float* keep, S* fresh, int64_t D,
                int64_t R, float* statistics) {
  Vec squares[N], sums[N];
  for (int j = 0; j < N; ++j) squares[j] = sums[j] = zero();
  each_vector(D, [&](int64_t d, int64_t count) {
    Vec h[N];
    for (int i = 0; i < N; ++i) h[i] = load(streams + i * D + d, count);
    for (int i = 0; i < N; ++i) prefetch(streams + (N + i) * D + d);
    Vec total[N];
    if (output == nullptr) {
      for (int j = 0; j < N; ++j) total[j] = h[j];
    } else {
      for (int j = 0; j < N; ++j) {
        total[j] = zero();
        for (int i = 0; i < N; ++i) total[j] += keep[i * N + j] * h[i];
      }
      for (int64_t r = 0; r < R; ++r) {
        Vec y = load(output + r * D + d, count);
        for (int j = 0; j < N; ++j) total[j] += write[r * N + j] * y;
      }
    }
    for (int j = 0; j < N; ++j) {
      store(fresh + j * D + d, total[j], count);
      Vec v = as_stored(total[j], fresh);
      squares[j] += v * v;
      sums[j] += v;
    }
  });
  if (statistics != nullptr)
    for (int j = 0; j < N; ++j) {
      statistics[2 * j] = sum(sums[j]);
      statistics[2 * j + 1] = sum(squares[j]);
    }
}

// Sum of squares of a row without its mean (the difference of mean square and squared mean would cancel).
template <typename S>
float centred_square(const S* row, float mean, int64_t D) {
  Vec squares = zero();
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    Vec v = load(row + d) - mean;
    squares += v * v;
  }
  float tail = 0;
  for (; d < D; ++d) tail += (widen(row[d]) - mean) * (widen(row[d]) - mean);
  return sum(squares) + tail;
}

// The product of a row of D numbers with `count` <= 8 rows of W [count][D] into z.
template <typename S, int B>
void project_some(const S* row, const float* projection, int64_t D, float* z) {
  Vec products[B];
  for (int b = 0; b < B; ++b) products[b] = zero();
  each_vector(D, [&](int64_t d, int64_t count) {
    Vec h = load(row + d, count);
    for (int b = 0; b < B; ++b) products[b] += h * load(projection + b * D + d, count);
  });
  for (int b = 0; b < B; ++b) z[b] = sum(products[b]);
}

// z [K] = W [K, D] row
template <typename S>
void project(const S* row, const float* projection, int64_t K, int64_t D, float* z) {
  for (int64_t k = 0; k < K; k += MAX_STREAMS)
    with_streams(std::min<int64_t>(MAX_STREAMS, K - k), [&](auto count) {
      project_some<S, decltype(count)::value>(row, projection + k * D, D, z + k);
    });
}

// -> H', statistics [T, rows, K + 2] or [0]
std::tuple<Tensor, Tensor> enter(const Tensor& streams_, const std::optional<Tensor>& output_,
                                 const std::optional<Tensor>& write_, const std::optional<Tensor>& keep_,
                                 const std::optional<Tensor>& projection_, bool is_centred) {
  Tensor streams = same(streams_), output = same(output_), write = same(write_), keep = same(keep_);
  Tensor projection = same(projection_);
  int64_t T = streams.size(0), N = streams.size(1), D = streams.size(2);
  int64_t R = output.defined() ? output.size(1) : 0, K = projection.defined() ? projection.size(0) : 0;
  Tensor fresh = at::empty_like(streams);
  Tensor statistics = at::empty({0}, streams.options().dtype(at::kFloat));
  int64_t width = K ? projection.size(1) : D, rows = K ? N * D / width : 0;
  if (K) statistics = at::empty({T, rows, K + 2}, statistics.options());
  Tensor transposed = K ? projection.t() : Tensor();
  with_scalar(streams, [&](auto scalar) {
    using S = decltype(scalar);
    const S *h = data<S>(streams), *y = data<S>(output);
    const float *w = data<float>(write), *k = data<float>(keep);
    S* result = data<S>(fresh);
    const float* p = data<float>(projection);
    float* found = K ? data<float>(statistics) : nullptr;
    with_streams(N, [&](auto n) {
      constexpr int n_ = decltype(n)::value;
      each_chunk(T, [&](int64_t, int64_t first, int64_t last) {
        float small[2 * MAX_STREAMS];
        for (int64_t t = first; t < last; ++t) {
          fold_token<S, n_>(h + t * N * D, y ? y + t * R * D : nullptr, w + t * R * N, k + t * N * N,
                            result + t * N * D, D, R, K ? small : nullptr);
          for (int64_t row = 0; row < rows; ++row) {
            const S* values = result + t * N * D + row * width;
            float total = small[2 * row], square = small[2 * row + 1];
            if (rows == 1)
              for (int j = 1; j < n_; ++j) total += small[2 * j], square += small[2 * j + 1];
            float* at = found + (t * rows + row) * (K + 2);
            float mean = is_centred ? total / width : 0.f;
            at[K] = mean;
            at[K + 1] = (is_centred ? centred_square(values, mean, width) : square) / width;
            if (rows > 1) project(values, p, K, D, at);
          }
        }
        if (rows != 1) return;
        // Wide rows: W does not fit the nearest cache, and the chunk is in the next one; a matrix product is best.
        Tensor block = fresh.narrow(0, first, last - first).view({-1, width}).to(at::kFloat);
        statistics.narrow(0, first, last - first).view({-1, K + 2}).narrow(1, 0, K).copy_(at::mm(block, transposed));
      });
    });
  });
  return {fresh, statistics};
}

Tensor fold(const Tensor& streams, const Tensor& output, const Tensor& write, const Tensor& keep) {
  return std::get<0>(enter(streams, output, write, keep, std::nullopt, false));
}

enum Norm { NONE = 0, RMS = 1, LAYER = 2 };

// read^T H' of one token into x [R D]; -> its sum and the sum of its squares
template <typename S, int N>
std::pair<float, float> read_token(const S* fresh, const float* read, float* x, int64_t D, int64_t R) {
  Vec sums = zero(), squares = zero();
  for (int64_t r = 0; r < R; ++r)
    each_vector(D, [&](int64_t d, int64_t count) {
      Vec total = zero();
      for (int i = 0; i < N; ++i) {
        if (r == 0) prefetch(fresh + (N + i) * D + d);
        total += read[i * R + r] * load(fresh + i * D + d, count);
      }
      store(x + r * D + d, total, count);
      sums += total;
      squares += total * total;
    });
  return {sum(sums), sum(squares)};
}

// -> norm(read^T H') [T, C], its mean and 1 / rms [T, 2]
std::tuple<Tensor, Tensor> leave(const Tensor& fresh, const Tensor& read_, const std::optional<Tensor>& weight_,
                                 const std::optional<Tensor>& bias_, int64_t norm, double eps) {
  Tensor read = same(read_), weight = same(weight_), bias = same(bias_);
  int64_t T = fresh.size(0), N = fresh.size(1), D = fresh.size(2), R = read.size(2), C = R * D;
  Tensor x = at::empty({T, C}, fresh.options());
  Tensor statistics = at::empty({norm ? T : 0, 2}, read.options());
  with_scalar(fresh, [&](auto scalar) {
    using S = decltype(scalar);
    const S* h = data<S>(fresh);
    S* result = data<S>(x);
    const float *a = data<float>(read), *gamma = data<float>(weight), *beta = data<float>(bias);
    float* found = data<float>(statistics);
    with_streams(N, [&](auto n) {
      each_chunk(T, [&](int64_t, int64_t first, int64_t last) {
        std::vector<float> row(C);
        for (int64_t t = first; t < last; ++t) {
          auto [total, square] = read_token<S, decltype(n)::value>(h + t * N * D, a + t * N * R, row.data(), D, R);
          float mean = 0, inverse = 1;
          if (norm == LAYER) {
            mean = total / C;
            square = 0;
            for (int64_t d = 0; d < C; ++d) square += (row[d] - mean) * (row[d] - mean);
          }
          if (norm) {
            inverse = 1 / std::sqrt(square / C + static_cast<float>(eps));
            found[2 * t] = mean;
            found[2 * t + 1] = inverse;
          }
          each_vector(C, [&](int64_t d, int64_t count) {
            Vec v = (load(row.data() + d, count) - mean) * inverse;
            if (gamma) v *= load(gamma + d, count);
            if (beta) v += load(beta + d, count);
            store(result + t * C + d, v, count);
          });
        }
      });
    });
  });
  return {x, statistics};
}

// -> gradient of x before the norm [T, R, D] in fp32, of read, and [2, C] of the norm's weight and bias
std::tuple<Tensor, Tensor, Tensor> leave_backward(const Tensor& grad_, const Tensor& fresh, const Tensor& read,
                                                  const Tensor& statistics, const std::optional<Tensor>& weight_,
                                                  int64_t norm) {
  Tensor grad = same(grad_), weight = same(weight_);
  int64_t T = fresh.size(0), N = fresh.size(1), D = fresh.size(2), R = read.size(2), C = R * D;
  Tensor g_x = at::empty({T, R, D}, read.options()), g_read = at::empty({T, N, R}, read.options());
  Tensor partial = at::zeros({(T + CHUNK - 1) / CHUNK, 2, C}, read.options());
  with_scalar(fresh, [&](auto scalar) {
    using S = decltype(scalar);
    const S *h = data<S>(fresh), *g = data<S>(grad);
    const float *a = data<float>(read), *gamma = data<float>(weight), *found = data<float>(statistics);
    float *into = data<float>(g_x), *of_read = data<float>(g_read), *sums = data<float>(partial);
    with_streams(N, [&](auto n) {
      constexpr int n_ = decltype(n)::value;
      each_chunk(T, [&](int64_t chunk, int64_t first, int64_t last) {
        std::vector<float> hat(C);
        float *of_weight = sums + chunk * 2 * C, *of_bias = of_weight + C;
        for (int64_t t = first; t < last; ++t) {
          const S* rows = h + t * N * D;
          float* dx = into + t * C;
          if (norm) {
            read_token<S, n_>(rows, a + t * N * R, hat.data(), D, R);
            float mean = found[2 * t], inverse = found[2 * t + 1];
            Vec along = zero(), total = zero();
            each_vector(C, [&](int64_t d, int64_t count) {
              Vec x = (load(hat.data() + d, count) - mean) * inverse;
              Vec v = load(g + t * C + d, count);
              store(of_weight + d, load(of_weight + d, count) + v * x, count);
              if (norm == LAYER) store(of_bias + d, load(of_bias + d, count) + v, count);
              if (gamma) v *= load(gamma + d, count);
              store(hat.data() + d, x, count);
              store(dx + d, v, count);
              along += v * x;
              total += v;
            });
            float share = sum(along) / C, offset = norm == LAYER ? sum(total) / C : 0.f;
            each_vector(C, [&](int64_t d, int64_t count) {
              store(dx + d, (load(dx + d, count) - load(hat.data() + d, count) * share - offset) * inverse, count);
            });
          } else {
            each_vector(C, [&](int64_t d, int64_t count) { store(dx + d, load(g + t * C + d, count), count); });
          }
          for (int64_t r = 0; r < R; ++r) {
            Vec products[n_];
            for (int i = 0; i < n_; ++i) products[i] = zero();
            each_vector(D, [&](int64_t d, int64_t count) {
              Vec v = load(dx + r * D + d, count);
              for (int i = 0; i < n_; ++i) products[i] += v * load(rows + i * D + d, count);
            });
            for (int i = 0; i < n_; ++i) of_read[(t * N + i) * R + r] = sum(products[i]);
          }
        }
      });
    });
  });
  return {g_x, g_read, partial.sum(0)};
}

// One token of the way back through the write. `grad` [N D] in fp32 is the gradient of H', already rounded.
template <typename S, int N>
void fold_backward_token(const float* grad, const S* streams, const S* output, const float* write, const float* keep,
                         S* g_streams, S* g_output, float* g_write, float* g_keep, int64_t D, int64_t R) {
  // One row of <H_i, G_j> at a time: N sums fit the registers for every N.
  for (int i = 0; i < N; ++i) {
    Vec products[N];
    for (int j = 0; j < N; ++j) products[j] = zero();
    each_vector(D, [&](int64_t d, int64_t count) {
      Vec h = load(streams + i * D + d, count), total = zero();
      for (int j = 0; j < N; ++j) {
        Vec g = load(grad + j * D + d, count);
        products[j] += h * g;
        total += keep[i * N + j] * g;
      }
      store(g_streams + i * D + d, total, count);
    });
    for (int j = 0; j < N; ++j) g_keep[i * N + j] = sum(products[j]);
  }
  for (int64_t r = 0; r < R; ++r) {
    Vec products[N];
    for (int j = 0; j < N; ++j) products[j] = zero();
    each_vector(D, [&](int64_t d, int64_t count) {
      Vec y = load(output + r * D + d, count), total = zero();
      for (int j = 0; j < N; ++j) {
        Vec g = load(grad + j * D + d, count);
        products[j] += y * g;
        total += write[r * N + j] * g;
      }
      store(g_output + r * D + d, total, count);
    });
    for (int j = 0; j < N; ++j) g_write[r * N + j] = sum(products[j]);
  }
}

// The gradient of H' of one token into `total` [N D], what later readers (`g`), the read and the statistics make of it;
// adds that of W [K][D] to `of_projection`. What flows through the logits is given in `of_rows` where W's rows are
// wide. `streams` are read next, and only fetched here.
template <typename S, int N>
void fresh_gradient(const S* streams, const S* g, const float* dx, const float* read, const S* fresh,
                    const float* of_rows, int64_t K, const float* projection, const float* of_z, float* of_projection,
                    const float* scale, const float* offset, float* total, int64_t D, int64_t R) {
  each_vector(D, [=](int64_t d, int64_t count) {
    Vec v[N], row[N];
    for (int j = 0; j < N; ++j) v[j] = g ? load(g + j * D + d, count) : zero();
    for (int64_t r = 0; r < R; ++r) {
      Vec x = load(dx + r * D + d, count);
      for (int j = 0; j < N; ++j) v[j] += read[j * R + r] * x;
    }
    for (int j = 0; j < N; ++j) {
      if (K) prefetch(fresh + (N + j) * D + d);
      if (g) prefetch(g + (N + j) * D + d);
      prefetch(streams + j * D + d);
    }
    for (int j = 0; j < N; ++j) {
      if (of_rows) v[j] += load(of_rows + j * D + d, count);
      if (!K) continue;
      row[j] = load(fresh + j * D + d, count);
      v[j] += scale[j] * row[j] + offset[j];
    }
    if (of_projection)
      for (int64_t k = 0; k < K; ++k) {
        Vec w = load(projection + k * D + d, count), of_w = load(of_projection + k * D + d, count);
        for (int j = 0; j < N; ++j) {
          float z = of_z[j * (K + 2) + k];
          v[j] += z * w;
          of_w += z * row[j];
        }
        store(of_projection + k * D + d, of_w, count);
      }
    // Rounded, as it is where a stage boundary lies between the write and the read.
    for (int j = 0; j < N; ++j) store(total + j * D + d, as_stored(v[j], fresh), count);
  });
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of H' (by later readers), x and the statistics -> of H, Y, write, keep and W
Five enter_backward(const std::optional<Tensor>& g_fresh_, const Tensor& g_x_, const Tensor& read_, const Tensor& fresh,
                    const Tensor& statistics, const Tensor& g_statistics_, const Tensor& streams_,
                    const std::optional<Tensor>& output_, const std::optional<Tensor>& write_,
                    const std::optional<Tensor>& keep_, const std::optional<Tensor>& projection_, bool is_centred) {
  Tensor g_fresh = same(g_fresh_), g_x = same(g_x_), read = same(read_), g_statistics = same(g_statistics_);
  Tensor streams = same(streams_), output = same(output_), write = same(write_), keep = same(keep_);
  Tensor projection = same(projection_);
  int64_t T = fresh.size(0), N = fresh.size(1), D = fresh.size(2), R = read.size(2);
  int64_t K = projection.defined() ? projection.size(0) : 0, width = K ? projection.size(1) : D;
  int64_t rows = K ? N * D / width : 0;
  auto small = read.options();
  Tensor g_streams = at::empty_like(fresh), g_output, g_write, g_keep;
  Tensor partial = at::zeros({rows > 1 ? (T + CHUNK - 1) / CHUNK : 0, K, D}, small);
  bool has_output = output.defined();
  g_output = has_output ? at::empty_like(output) : at::empty({0}, small);
  g_write = has_output ? at::empty_like(write) : at::empty({0}, small);
  g_keep = has_output ? at::empty_like(keep) : at::empty({0}, small);
  with_scalar(fresh, [&](auto scalar) {
    using S = decltype(scalar);
    const S *g = data<S>(g_fresh), *now = data<S>(fresh), *h = data<S>(streams), *y = data<S>(output);
    const float *dx = data<float>(g_x), *a = data<float>(read), *w = data<float>(write), *k = data<float>(keep);
    const float *found = data<float>(statistics), *of_found = data<float>(g_statistics), *p = data<float>(projection);
    float* of_w = data<float>(partial);
    S *dh = data<S>(g_streams), *dy = has_output ? data<S>(g_output) : nullptr;
    float *dw = data<float>(g_write), *dk = data<float>(g_keep);
    with_streams(N, [&](auto n) {
      constexpr int n_ = decltype(n)::value;
      each_chunk(T, [&](int64_t chunk, int64_t first, int64_t last) {
        // What flows through the logits: a matrix product where rows are wide, else in the loop over tokens.
        Tensor through;
        if (rows == 1)
          through = at::mm(g_statistics.narrow(0, first, last - first).view({-1, K + 2}).narrow(1, 0, K), projection);
        const float* logits = rows == 1 ? through.const_data_ptr<float>() : nullptr;
        float* of_projection = rows > 1 ? of_w + chunk * K * D : nullptr;
        std::vector<float> total(N * D);
        for (int64_t t = first; t < last; ++t) {
          float scale[n_], offset[n_];
          for (int j = 0; j < n_; ++j) {
            scale[j] = offset[j] = 0;
            if (!K) continue;
            int64_t at = (t * rows + (rows == 1 ? 0 : j)) * (K + 2) + K;
            scale[j] = of_found[at + 1] * 2 / width;
            if (is_centred) offset[j] = of_found[at] / width - scale[j] * found[at];
          }
          const float* of_rows = logits ? logits + (t - first) * N * D : nullptr;
          fresh_gradient<S, n_>(h + t * N * D, g ? g + t * N * D : nullptr, dx + t * R * D, a + t * N * R,
                                now + t * N * D, of_rows, K, p, of_found + t * rows * (K + 2), of_projection, scale,
                                offset, total.data(), D, R);
          if (!has_output)
            each_vector(N * D, [&](int64_t d, int64_t count) {
              store(dh + t * N * D + d, load(total.data() + d, count), count);
            });
          else
            fold_backward_token<S, n_>(total.data(), h + t * N * D, y + t * R * D, w + t * R * N, k + t * N * N,
                                       dh + t * N * D, dy + t * R * D, dw + t * R * N, dk + t * N * N, D, R);
        }
      });
    });
  });
  Tensor g_projection = at::zeros({0}, small);
  if (rows == 1)
    g_projection = at::mm(g_statistics.view({-1, K + 2}).narrow(1, 0, K).t(), fresh.view({-1, width}).to(at::kFloat));
  else if (rows > 1)
    g_projection = partial.sum(0);
  return {g_streams, g_output, g_write, g_keep, g_projection};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fold_backward(const Tensor& grad_, const Tensor& streams_,
                                                         const Tensor& output_, const Tensor& write_,
                                                         const Tensor& keep_) {
  Tensor grad = same(grad_), streams = same(streams_), output = same(output_), write = same(write_);
  Tensor keep = same(keep_);
  int64_t T = streams.size(0), N = streams.size(1), D = streams.size(2), R = output.size(1);
  Tensor g_streams = at::empty_like(streams), g_output = at::empty_like(output);
  Tensor g_write = at::empty_like(write), g_keep = at::empty_like(keep);
  with_scalar(streams, [&](auto scalar) {
    using S = decltype(scalar);
    const S *g = data<S>(grad), *h = data<S>(streams), *y = data<S>(output);
    const float *w = data<float>(write), *k = data<float>(keep);
    S *dh = data<S>(g_streams), *dy = data<S>(g_output);
    float *dw = data<float>(g_write), *dk = data<float>(g_keep);
    with_streams(N, [&](auto n) {
      each_chunk(T, [&](int64_t, int64_t first, int64_t last) {
        std::vector<float> total(N * D);
        for (int64_t t = first; t < last; ++t) {
          each_vector(N * D, [&](int64_t d, int64_t count) {
            store(total.data() + d, load(g + t * N * D + d, count), count);
          });
          fold_backward_token<S, decltype(n)::value>(total.data(), h + t * N * D, y + t * R * D, w + t * R * N,
                                                     k + t * N * N, dh + t * N * D, dy + t * R * D, dw + t * R * N,
                                                     dk + t * N * N, D, R);
        }
      });
    });
  });
  return {g_streams, g_output, g_write, g_keep};
}

}  // namespace

TORCH_LIBRARY(megatron_hc_cpp, m) {
  m.def("enter(Tensor h, Tensor? y, Tensor? write, Tensor? keep, Tensor? w, bool centred) -> (Tensor, Tensor)");
  m.def("leave(Tensor h, Tensor read, Tensor? weight, Tensor? bias, int norm, float eps) -> (Tensor, Tensor)");
  m.def("leave_backward(Tensor g, Tensor h, Tensor read, Tensor s, Tensor? weight, int norm) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("enter_backward(Tensor? g, Tensor gx, Tensor read, Tensor h2, Tensor s, Tensor gs, Tensor h, Tensor? y, "
        "Tensor? write, Tensor? keep, Tensor? w, bool centred) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("fold(Tensor h, Tensor y, Tensor write, Tensor keep) -> Tensor");
  m.def("fold_backward(Tensor g, Tensor h, Tensor y, Tensor write, Tensor keep) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_hc_cpp, CPU, m) {
  m.impl("enter", enter);
  m.impl("leave", leave);
  m.impl("leave_backward", leave_backward);
  m.impl("enter_backward", enter_backward);
  m.impl("fold", fold);
  m.impl("fold_backward", fold_backward);
}
