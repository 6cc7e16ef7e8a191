/* What stands between the matrix products of a small Llama, for one thread of a CPU: norms, rotary attention over
 * records laid end to end, the gated activation, and the gradient of cross-entropy. All arrays are float32, row by row.
 *
 * client/native.py compiles this file once per machine, checks it against torch, and does without it where that fails.
 * Vectors are GCC's and Clang's own extension, so nothing here names a processor.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int64_t count;

#define INLINE static inline __attribute__((always_inline))
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))

enum { ROWS = 4, QUERIES = 64 };

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec splat(float value) { return value - (vec){0}; }

INLINE float sum_of(vec v) {
  float part[W];
  store(part, v);
#pragma GCC unroll 8
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

INLINE vec greater(vec a, vec b) {
  ivec more = a > b;
  return (vec)(((ivec)a & more) | ((ivec)b & ~more));
}

INLINE float greatest_of(vec v) {
  float part[W];
  store(part, v);
#pragma GCC unroll 8
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
  return part[0];
}

/* e^x to 2 units in the last place for x up to 88, zero below -87: Cody and Waite's reduction, a minimax polynomial
 * (Moshier, Cephes, expf). */
INLINE vec exponential(vec x) {
  const ivec gone = x < splat(-87.0f); /* false for NaN, which stays NaN */
  x = (vec)(((ivec)splat(-87.0f) & gone) | ((ivec)x & ~gone));
  const vec shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: the integer lies in the last bits */
  const vec whole = shifted - 12582912.0f;
  vec r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const ivec power = ((ivec)shifted - 0x4B400000 + 127) << 23;
  return (vec)((ivec)(p * (vec)power) & ~gone);
}

/* 1 / (1 + e^-x), zero below -87. The reciprocal starts from a guess by exponent and takes three of Newton's steps, which is a quarter
 * of what a division costs. */
INLINE vec sigmoid(vec x) {
  const ivec far = x < splat(-87.0f); /* false for NaN */
  x = (vec)(((ivec)splat(-87.0f) & far) | ((ivec)x & ~far));
  const vec below = 1.0f + exponential(-x);
  vec r = (vec)(0x7EF311C7 - (ivec)below);
  r = r * (2.0f - below * r);
  r = r * (2.0f - below * r);
  return (vec)((ivec)(r * (2.0f - below * r)) & ~far);
}

/* inner = x * scale * weight with scale = 1 / sqrt(mean(x^2) + epsilon); `scale` has one number per row. */
void rms_forward(const float *x, const float *weight, float *inner, float *scale, count rows, count width,
                 float epsilon) {
  for (count row = 0; row < rows; row++, x += width, inner += width) {
    vec squares = {0}, more = {0};
    count i = 0;
    for (; i + 2 * W <= width; i += 2 * W) {
      squares += load(x + i) * load(x + i);
      more += load(x + i + W) * load(x + i + W);
    }
    float total = sum_of(squares + more);
    for (; i < width; i++) total += x[i] * x[i];
    const float by = 1.0f / sqrtf(total / (float)width + epsilon);
    scale[row] = by;
    for (i = 0; i + W <= width; i += W) store(inner + i, load(x + i) * by * load(weight + i));
    for (; i < width; i++) inner[i] = x[i] * by * weight[i];
  }
}

/* out = beside + gradient at x, from `back` at inner. `out` may be `beside`. */
void rms_backward(const float *back, const float *x, const float *scale, const float *weight, const float *beside,
                  float *out, count rows, count width) {
  for (count row = 0; row < rows; row++, x += width, back += width, beside += width, out += width) {
    vec along = {0};
    count i = 0;
    for (; i + W <= width; i += W) along += load(back + i) * load(weight + i) * load(x + i);
    float total = sum_of(along);
    for (; i < width; i++) total += back[i] * weight[i] * x[i];
    const float by = scale[row], pull = total * by * by * by / (float)width;
    for (i = 0; i + W <= width; i += W)
      store(out + i, load(beside + i) + (load(back + i) * load(weight + i) * by - load(x + i) * pull));
    for (; i < width; i++) out[i] = beside[i] + (back[i] * weight[i] * by - x[i] * pull);
  }
}

/* product = silu(gate) * up; a row of `both` holds the gates and then the ups. */
void gate_forward(const float *both, float *product, count rows, count width) {
  for (count row = 0; row < rows; row++, both += 2 * width, product += width) {
    const float *gate = both, *up = both + width;
    count i = 0;
    for (; i + W <= width; i += W) store(product + i, load(gate + i) * sigmoid(load(gate + i)) * load(up + i));
    if (i < width) {
      float last[W] = {0};
      memcpy(last, gate + i, sizeof(float) * (size_t)(width - i));
      store(last, load(last) * sigmoid(load(last)));
      for (count j = 0; i + j < width; j++) product[i + j] = last[j] * up[i + j];
    }
  }
}

INLINE void gate_back(vec back, vec gate, vec up, float *to_gate, float *to_up) {
  const vec s = sigmoid(gate), switched = gate * s;
  store(to_up, back * switched);
  store(to_gate, back * up * (s + switched * (1.0f - s)));
}

/* Gradients at the gates and ups, in the layout of `both`; `out` may be `both`. */
void gate_backward(const float *back, const float *both, float *out, count rows, count width) {
  for (count row = 0; row < rows; row++, back += width, both += 2 * width, out += 2 * width) {
    count i = 0;
    for (; i + W <= width; i += W)
      gate_back(load(back + i), load(both + i), load(both + width + i), out + i, out + width + i);
    if (i < width) {
      float last[5][W] = {{0}};
      const size_t bytes = sizeof(float) * (size_t)(width - i);
      memcpy(last[0], back + i, bytes);
      memcpy(last[1], both + i, bytes);
      memcpy(last[2], both + width + i, bytes);
      gate_back(load(last[0]), load(last[1]), load(last[2]), last[3], last[4]);
      memcpy(out + i, last[3], bytes);
      memcpy(out + width + i, last[4], bytes);
    }
  }
}

/* In place: logits become weight * (softmax - one at the target), row by row. */
void loss_backward(float *logits, const int64_t *targets, const float *weights, count rows, count width) {
  for (count row = 0; row < rows; row++, logits += width) {
    float most = logits[0];
    vec best = splat(most);
    count i = 0;
    for (; i + W <= width; i += W) best = greater(load(logits + i), best);
    most = greatest_of(best);
    for (; i < width; i++) most = logits[i] > most ? logits[i] : most;
    vec sums = {0};
    float total = 0;
    for (i = 0; i + W <= width; i += W) {
      const vec e = exponential(load(logits + i) - most);
      sums += e;
      store(logits + i, e);
    }
    if (i < width) {
      float last[W] = {0};
      memcpy(last, logits + i, sizeof(float) * (size_t)(width - i));
      store(last, exponential(load(last) - most));
      for (count j = 0; i + j < width; j++) total += logits[i + j] = last[j];
    }
    const float by = weights[row] / (total + sum_of(sums));
    for (i = 0; i + W <= width; i += W) store(logits + i, load(logits + i) * by);
    for (; i < width; i++) logits[i] *= by;
    logits[targets[row]] -= weights[row];
  }
}

/* `rows` rows of C (+)= A B over k in [from, to): A's element (r, k) stands at a[r * ra + k * ka], rows of B and C are
 * `ldb` and `ldc` apart, and `wide` vectors of each are taken. */
INLINE void tile(const int rows, const int wide, const int add, const float *a, count ra, count ka, const float *b, count ldb, float *c,
                 count ldc, count from, count to) {
  vec sums[ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) sums[r][v] = add ? load(c + r * ldc + v * W) : (vec){0};
  for (count k = from; k < to; k++) {
    vec row[2];
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) row[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const float factor = a[r * ra + k * ka];
#pragma GCC unroll 2
      for (int v = 0; v < wide; v++) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) store(c + r * ldc + v * W, sums[r][v]);
}

/* As `tile`, over columns [0, columns), a multiple of W. */
INLINE void strip(const int add, const float *a, count ra, count ka, const float *b, count ldb, float *c, count ldc,
                  count columns, count from, count to) {
  count j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) tile(ROWS, 2, add, a, ra, ka, b + j, ldb, c + j, ldc, from, to);
  if (j < columns) tile(ROWS, 1, add, a, ra, ka, b + j, ldb, c + j, ldc, from, to);
}

/* Rotate `rows` rows of one head by their positions from `first` on, times `by`, into rows of `to` that are `ldt`
 * apart; `back` turns the other way. */
INLINE void rotated(const float *restrict from, count ldf, float *restrict to, count ldt, const float *cosines,
                    const float *sines, count first, count rows, count width, float by, const int back) {
  const count half = width / 2;
  const float sign = back ? -1.0f : 1.0f;
  for (count t = 0; t < rows; t++) {
    const float *restrict x = from + t * ldf, *restrict c = cosines + (first + t) * half;
    const float *restrict s = sines + (first + t) * half;
    float *restrict y = to + t * ldt;
    for (count i = 0; i < half; i++) {
      const float one = x[i], other = x[i + half], sine = sign * s[i];
      y[i] = (one * c[i] - other * sine) * by;
      y[i + half] = (other * c[i] + one * sine) * by;
    }
  }
}

/* Scores of keys after the query's own, the `last` of these, become minus a lot. */
INLINE vec no_later(vec scores, count last) {
  ivec at;
  for (int i = 0; i < W; i++) at[i] = i;
  const ivec later = at > ((int32_t)last - (ivec){0});
  return (vec)(((ivec)splat(-1e30f) & later) | ((ivec)scores & ~later));
}

INLINE void transposed(const float *from, count ldf, float *to, count ldt, count rows, count columns) {
  for (count t = 0; t < rows; t++)
    for (count i = 0; i < columns; i++) to[i * ldt + t] = from[t * ldf + i];
}

/* `out` and, for the way back, the logarithm of each query's sum, `(query heads, tokens)`. Records are
 * [starts[i], starts[i + 1]). Returns 0, or 1 where there is no memory. */
int attention_forward(const float *q, const float *k, const float *v, const float *cosines, const float *sines,
                      const int64_t *starts, count records, float *out, float *logs, count heads, count share,
                      count width, count ld_in, count ld_out, float scale) {
  count longest = 0;
  for (count r = 0; r < records; r++)
    if (starts[r + 1] - starts[r] > longest) longest = starts[r + 1] - starts[r];
  const count most = UP(longest, W) + W, wide = UP(width, W), tokens = starts[records];
  float *memory = calloc((size_t)((wide + 2 * wide) * most + QUERIES * (most + 2 * wide)), sizeof(float));
  if (!memory) return 1;
  float *keys = memory, *turned = keys + wide * most, *values = turned + wide * most, *asked = values + wide * most,
        *mixed = asked + QUERIES * wide, *scores = mixed + QUERIES * wide;
  for (count record = 0; record < records; record++) {
    const count start = starts[record], length = starts[record + 1] - start, padded = UP(length, W);
    for (count head = 0; head < heads; head++) {
      const count column = head * width;
      rotated(k + start * ld_in + column, ld_in, turned, wide, cosines, sines, 0, length, width, 1.0f, 0);
      for (count i = 0; i < width; i++) memset(keys + i * padded, 0, sizeof(float) * (size_t)padded);
      transposed(turned, wide, keys, padded, length, width);
      for (count t = 0; t < length; t++)
        memcpy(values + t * wide, v + (start + t) * ld_in + column, sizeof(float) * (size_t)width);
      memset(values + length * wide, 0, sizeof(float) * (size_t)((UP(length, ROWS) - length) * wide));
      for (count own = head * share; own < (head + 1) * share; own++)
        for (count first = 0; first < length; first += QUERIES) {
          const count rows = length - first < QUERIES ? length - first : QUERIES, whole = UP(rows, ROWS);
          rotated(q + (start + first) * ld_in + own * width, ld_in, asked, wide, cosines, sines, first, rows, width,
                  scale, 0);
          memset(asked + rows * wide, 0, sizeof(float) * (size_t)((whole - rows) * wide));
          for (count row = 0; row < whole; row += ROWS) {
            const count at = first + row, taken = UP(at + ROWS, W);
            float *here = scores + row * padded;
            strip(0, asked + row * wide, wide, 1, keys, padded, here, padded, taken, 0, width);
            for (int r = 0; r < ROWS; r++) {
              float *line = here + r * padded;
              if (at + r >= length) { /* padding: no chances at all */
                for (count j = 0; j < taken; j += W) store(line + j, (vec){0});
                continue;
              }
              store(line + taken - W, no_later(load(line + taken - W), at + r - (taken - W)));
              vec best = load(line), sums = {0};
              for (count j = W; j < taken; j += W) best = greater(load(line + j), best);
              const float most_of = greatest_of(best);
              for (count j = 0; j < taken; j += W) {
                const vec e = exponential(load(line + j) - most_of);
                sums += e;
                store(line + j, e);
              }
              const float total = sum_of(sums), by = 1.0f / total;
              for (count j = 0; j < taken; j += W) store(line + j, load(line + j) * by);
              logs[own * tokens + start + at + r] = most_of + logf(total);
            }
            const count until = at + ROWS < length ? at + ROWS : length;
            strip(0, here, padded, 1, values, wide, mixed + row * wide, wide, wide, 0, until);
          }
          for (count row = 0; row < rows; row++)
            memcpy(out + (start + first + row) * ld_out + own * width, mixed + row * wide,
                   sizeof(float) * (size_t)width);
        }
    }
  }
  free(memory);
  return 0;
}

/* Gradients at q, k and v, `to_q`, `to_k` (not where it is NULL) and `to_v`, from `back` at the result, whose rows are
 * `ld_out` apart. Returns 0, or 1 where there is no memory. */
int attention_backward(const float *q, const float *k, const float *v, const float *cosines, const float *sines,
                       const int64_t *starts, count records, const float *logs, const float *back, float *to_q,
                       float *to_k, float *to_v, count heads, count share, count width, count ld_in, count ld_out,
                       float scale) {
  count longest = 0;
  for (count r = 0; r < records; r++)
    if (starts[r + 1] - starts[r] > longest) longest = starts[r + 1] - starts[r];
  const count most = UP(longest, W) + W, wide = UP(width, W), tokens = starts[records];
  float *memory = calloc((size_t)(5 * wide * most + QUERIES * (2 * most + 3 * wide)), sizeof(float));
  if (!memory) return 1;
  float *keys = memory, *turned = keys + wide * most, *values = turned + wide * most, *for_keys = values + wide * most,
        *for_values = for_keys + wide * most, *asked = for_values + wide * most, *given = asked + QUERIES * wide,
        *for_asked = given + QUERIES * wide, *chances = for_asked + QUERIES * wide, *slopes = chances + QUERIES * most;
  for (count record = 0; record < records; record++) {
    const count start = starts[record], length = starts[record + 1] - start, padded = UP(length, W);
    const count bottom = UP(length, ROWS);
    for (count head = 0; head < heads; head++) {
      const count column = head * width;
      rotated(k + start * ld_in + column, ld_in, turned, wide, cosines, sines, 0, length, width, 1.0f, 0);
      for (count i = 0; i < width; i++) {
        memset(keys + i * padded, 0, sizeof(float) * (size_t)padded);
        memset(values + i * padded, 0, sizeof(float) * (size_t)padded);
      }
      transposed(turned, wide, keys, padded, length, width);
      transposed(v + start * ld_in + column, ld_in, values, padded, length, width);
      memset(for_keys, 0, sizeof(float) * (size_t)(bottom * wide));
      memset(for_values, 0, sizeof(float) * (size_t)(bottom * wide));
      for (count own = head * share; own < (head + 1) * share; own++)
        for (count first = 0; first < length; first += QUERIES) {
          const count rows = length - first < QUERIES ? length - first : QUERIES, whole = UP(rows, ROWS);
          rotated(q + (start + first) * ld_in + own * width, ld_in, asked, wide, cosines, sines, first, rows, width,
                  scale, 0);
          for (count row = 0; row < rows; row++)
            memcpy(given + row * wide, back + (start + first + row) * ld_out + own * width,
                   sizeof(float) * (size_t)width);
          memset(asked + rows * wide, 0, sizeof(float) * (size_t)((whole - rows) * wide));
          memset(given + rows * wide, 0, sizeof(float) * (size_t)((whole - rows) * wide));
          for (count row = 0; row < whole; row += ROWS) {
            const count at = first + row, taken = UP(at + ROWS, W);
            float *chance = chances + row * padded, *slope = slopes + row * padded;
            strip(0, asked + row * wide, wide, 1, keys, padded, chance, padded, taken, 0, width);
            strip(0, given + row * wide, wide, 1, values, padded, slope, padded, taken, 0, width);
            for (int r = 0; r < ROWS; r++) {
              float *p = chance + r * padded, *d = slope + r * padded;
              if (at + r >= length) {
                for (count j = 0; j < taken; j += W) {
                  store(p + j, (vec){0});
                  store(d + j, (vec){0});
                }
                continue;
              }
              const float log = logs[own * tokens + start + at + r];
              store(p + taken - W, no_later(load(p + taken - W), at + r - (taken - W)));
              vec sums = {0};
              for (count j = 0; j < taken; j += W) {
                const vec e = exponential(load(p + j) - log);
                sums += e * load(d + j);
                store(p + j, e);
              }
              const float mean = sum_of(sums);
              for (count j = 0; j < taken; j += W) store(d + j, load(p + j) * (load(d + j) - mean));
            }
            const count until = at + ROWS < length ? at + ROWS : length;
            strip(0, slope, padded, 1, turned, wide, for_asked + row * wide, wide, wide, 0, until);
          }
          const count last = first + whole < bottom ? first + whole : bottom;
          for (count j = 0; j < last; j += ROWS) { /* what these queries say about keys and values j .. j + ROWS */
            const count from = j > first ? j - first : 0;
            strip(1, chances + j, 1, padded, given, wide, for_values + j * wide, wide, wide, from, rows);
            if (to_k) strip(1, slopes + j, 1, padded, asked, wide, for_keys + j * wide, wide, wide, from, rows);
          }
          rotated(for_asked, wide, to_q + (start + first) * ld_in + own * width, ld_in, cosines, sines, first, rows,
                  width, scale, 1);
        }
      for (count t = 0; t < length; t++)
        memcpy(to_v + (start + t) * ld_in + column, for_values + t * wide, sizeof(float) * (size_t)width);
      if (to_k)
        rotated(for_keys, wide, to_k + start * ld_in + column, ld_in, cosines, sines, 0, length, width,
                1.0f, 1);
    }
  }
  free(memory);
  return 0;
}

int vector_width(void) { return W; }

/* `strip` for any number of rows, one after the other where fewer than ROWS are left. */
INLINE void strips(const int add, const float *a, count ra, count ka, const float *b, count ldb, float *c, count ldc,
                   count rows, count columns, count from, count to) {
  count row = 0;
  for (; row + ROWS <= rows; row += ROWS) strip(add, a + row * ra, ra, ka, b, ldb, c + row * ldc, ldc, columns, from, to);
  for (; row < rows; row++) {
    count j = 0;
    for (; j + 2 * W <= columns; j += 2 * W)
      tile(1, 2, add, a + row * ra, ra, ka, b + j, ldb, c + row * ldc + j, ldc, from, to);
    if (j < columns) tile(1, 1, add, a + row * ra, ra, ka, b + j, ldb, c + row * ldc + j, ldc, from, to);
  }
}

/* y += x A^T B^T, each user's rows with factors of their own; `low` gets x A^T, its rows UP(rank, W) apart. User i has
 * rows [users[i], users[i + 1]), A at a + i * step_a, shape (rank, inputs), and B at b + i * step_b, shape
 * (outputs, rank). Inputs and outputs are multiples of W. Returns 0, or 1 where there is no memory. */
int factors_forward(const float *x, count ldx, const float *a, count step_a, const float *b, count step_b, float *low,
                    float *y, count ldy, const int64_t *users, count number, count rank, count inputs, count outputs) {
  const count wide = UP(rank, W);
  float *memory = calloc((size_t)(wide * inputs + rank * outputs), sizeof(float));
  if (!memory) return 1;
  float *down = memory, *up = memory + wide * inputs;
  for (count user = 0; user < number; user++) {
    const count start = users[user], rows = users[user + 1] - start;
    transposed(a + user * step_a, inputs, down, wide, rank, inputs);
    transposed(b + user * step_b, rank, up, outputs, outputs, rank);
    float *here = low + start * wide;
    strips(0, x + start * ldx, ldx, 1, down, wide, here, wide, rows, wide, 0, inputs);
    strips(1, here, wide, 1, up, outputs, y + start * ldy, ldy, rows, outputs, 0, rank);
  }
  free(memory);
  return 0;
}

/* Gradients of the factors, summed over each of `runs` (whole users, or their records): to_a (runs, rank, inputs) and
 * to_b (runs, outputs, rank), from `back` at y; and, where `toward` is not NULL, what they let through to x, added. */
int factors_backward(const float *back, count ldb, const float *x, count ldx, const float *low, const float *a,
                     count step_a, const float *b, count step_b, float *toward, float *to_a, float *to_b,
                     const int64_t *users, count number, const int64_t *runs, count rank, count inputs, count outputs) {
  const count wide = UP(rank, W);
  count longest = 0, run = 0;
  for (count user = 0; user < number; user++)
    if (users[user + 1] - users[user] > longest) longest = users[user + 1] - users[user];
  float *memory = calloc((size_t)(wide * outputs + wide * longest + rank * outputs), sizeof(float));
  if (!memory) return 1;
  float *up = memory, *to_low = up + wide * outputs, *turned = to_low + wide * longest;
  for (count user = 0; user < number; user++) {
    const count start = users[user], end = users[user + 1], rows = end - start;
    for (count i = 0; i < outputs; i++)
      memcpy(up + i * wide, b + user * step_b + i * rank, sizeof(float) * (size_t)rank);
    strips(0, back + start * ldb, ldb, 1, up, wide, to_low, wide, rows, wide, 0, outputs);
    if (toward)
      strips(1, to_low, wide, 1, a + user * step_a, inputs, toward + start * inputs, inputs, rows, inputs, 0, rank);
    for (; runs[run] < end; run++) {
      const count first = runs[run], length = runs[run + 1] - first;
      strips(0, to_low + (first - start) * wide, 1, wide, x + first * ldx, ldx, to_a + run * rank * inputs, inputs,
             rank, inputs, 0, length);
      strips(0, low + first * wide, 1, wide, back + first * ldb, ldb, turned, outputs, rank, outputs, 0, length);
      transposed(turned, outputs, to_b + run * rank * outputs, rank, rank, outputs);
    }
  }
  free(memory);
  return 0;
}
