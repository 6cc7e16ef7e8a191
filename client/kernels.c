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
#define APART static __attribute__((noinline))
#if defined(__clang__)
#define PICKED(a, b, from) picked(a, b, from)
#else
#define PICKED(a, b, from) __builtin_shuffle(a, b, from)
#endif
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* Rows of a tile that is two vectors wide, of one that is one wide, and queries of attention at a time. */
enum { ROWS = W == 16 ? 8 : 4, MOST = W == 16 ? 16 : 8, QUERIES = 64 };

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec splat(float value) { return value - (vec){0}; }

#if defined(__clang__)
/* Each number from those of `a` and `b` side by side. */
INLINE vec picked(vec a, vec b, ivec from) {
  vec out;
  for (int i = 0; i < W; i++) out[i] = from[i] < W ? a[from[i]] : b[from[i] - W];
  return out;
}
#endif

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
  vec sums[MOST][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) sums[r][v] = add ? load(c + r * ldc + v * W) : (vec){0};
  for (count k = from; k < to; k++) {
    vec row[2];
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) row[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const float factor = a[r * ra + k * ka];
#pragma GCC unroll 2
      for (int v = 0; v < wide; v++) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) store(c + r * ldc + v * W, sums[r][v]);
}

/* As `tile`, over columns [0, columns), a multiple of W. */
INLINE void strip(const int rows, const int add, const float *a, count ra, count ka, const float *b, count ldb, float *c,
                  count ldc, count columns, count from, count to) {
  count j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) tile(rows, 2, add, a, ra, ka, b + j, ldb, c + j, ldc, from, to);
  if (j < columns) tile(rows, 1, add, a, ra, ka, b + j, ldb, c + j, ldc, from, to);
}

/* As `strip`, for any number of rows. */
INLINE void any_strips(const int add, const float *a, count ra, count ka, const float *b, count ldb, float *c, count ldc,
                       count rows, count columns, count from, count to) {
  count row = 0;
  for (; row + ROWS <= rows; row += ROWS)
    strip(ROWS, add, a + row * ra, ra, ka, b, ldb, c + row * ldc, ldc, columns, from, to);
  for (; row + ROWS / 2 <= rows; row += ROWS / 2)
    strip(ROWS / 2, add, a + row * ra, ra, ka, b, ldb, c + row * ldc, ldc, columns, from, to);
  for (; row < rows; row++) strip(1, add, a + row * ra, ra, ka, b, ldb, c + row * ldc, ldc, columns, from, to);
}

APART void strips(const float *a, count ra, count ka, const float *b, count ldb, float *c,
                                             count ldc, count rows, count columns, count from, count to) {
  any_strips(0, a, ra, ka, b, ldb, c, ldc, rows, columns, from, to);
}

APART void strips_onto(const float *a, count ra, count ka, const float *b, count ldb,
                                                  float *c, count ldc, count rows, count columns, count from,
                                                  count to) {
  any_strips(1, a, ra, ka, b, ldb, c, ldc, rows, columns, from, to);
}

/* C = A times one vector of columns over `depth`. */
APART void against(const float *a, count lda, const float *b, count ldb, float *c, count ldc, count rows,
                   count depth) {
  count row = 0;
  for (; row + MOST <= rows; row += MOST) tile(MOST, 1, 0, a + row * lda, lda, 1, b, ldb, c + row * ldc, ldc, 0, depth);
  for (; row + 4 <= rows; row += 4) tile(4, 1, 0, a + row * lda, lda, 1, b, ldb, c + row * ldc, ldc, 0, depth);
  for (; row < rows; row++) tile(1, 1, 0, a + row * lda, lda, 1, b, ldb, c + row * ldc, ldc, 0, depth);
}

/* Rotate `rows` rows of one head by their positions from `first` on, times `by`, into rows of `to` that are `ldt`
 * apart; `back` turns the other way. */
INLINE void rotated(const float *restrict from, count ldf, float *restrict to, count ldt, const float *cosines,
                    const float *sines, count first, count rows, count width, float by, const int back) {
  const count half = width / 2;
  const float sign = back ? -by : by;
  for (count t = 0; t < rows; t++) {
    const float *restrict x = from + t * ldf, *restrict c = cosines + (first + t) * half;
    const float *restrict s = sines + (first + t) * half;
    float *restrict y = to + t * ldt;
    if (half % W == 0) {
      for (count i = 0; i < half; i += W) {
        const vec one = load(x + i), other = load(x + i + half), cosine = load(c + i) * by, sine = load(s + i) * sign;
        store(y + i, one * cosine - other * sine);
        store(y + i + half, other * cosine + one * sine);
      }
      continue;
    }
    for (count i = 0; i < half; i++) {
      const float one = x[i], other = x[i + half], cosine = c[i] * by, sine = sign * s[i];
      y[i] = one * cosine - other * sine;
      y[i + half] = other * cosine + one * sine;
    }
  }
}

/* Rows of W numbers become columns. */
INLINE void turn_square(vec rows[W]) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & step) continue;
      ivec low, high;
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) {
        low[j] = j & step ? W + j - step : j;
        high[j] = j & step ? W + j : j + step;
      }
      const vec one = rows[i], other = rows[i + step];
      rows[i] = PICKED(one, other, low);
      rows[i + step] = PICKED(one, other, high);
    }
}

/* to (columns, ldt) = from (rows, columns) the other way round. */
APART void transposed(const float *from, count ldf, float *to, count ldt, count rows, count columns) {
  count t = 0;
  for (; t + W <= rows; t += W) {
    count i = 0;
    for (; i + W <= columns; i += W) {
      vec square[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) square[r] = load(from + (t + r) * ldf + i);
      turn_square(square);
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) store(to + (i + r) * ldt + t, square[r]);
    }
    for (; i < columns; i++)
      for (int r = 0; r < W; r++) to[i * ldt + t + r] = from[(t + r) * ldf + i];
  }
  for (; t < rows; t++)
    for (count i = 0; i < columns; i++) to[i * ldt + t] = from[t * ldf + i];
}

/* Scores of keys from `first` on under a vector of queries from `first` on: a key after its query gets minus a lot. */
INLINE void no_later(float *scores, count apart, count keys) {
  ivec at;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) at[i] = i;
  for (count key = 0; key < keys; key++) {
    const ivec early = at < ((int32_t)key - (ivec){0});
    const vec here = load(scores + key * apart);
    store(scores + key * apart, (vec)(((ivec)splat(-1e30f) & early) | ((ivec)here & ~early)));
  }
}

/* `rows` rows of `width` numbers from rows that are `ldf` apart into rows of `wide`. */
INLINE void copied(const float *from, count ldf, float *to, count wide, count rows, count width) {
  for (count t = 0; t < rows; t++) {
    count i = 0;
    for (; i + W <= width; i += W) store(to + t * wide + i, load(from + t * ldf + i));
    for (; i < width; i++) to[t * wide + i] = from[t * ldf + i];
  }
}

INLINE count longest_of(const int64_t *starts, count records) {
  count longest = 0;
  for (count r = 0; r < records; r++)
    if (starts[r + 1] - starts[r] > longest) longest = starts[r + 1] - starts[r];
  return longest;
}

/* Numbers of working memory that attention over records up to `longest` needs, there and back. */
INLINE count attention_room(count longest, count width) {
  const count most = UP(longest, W) + W, wide = UP(width, W);
  return 4 * wide * most + QUERIES * (2 * most + 5 * wide);
}

/* What each token takes from its record so far; a vector holds one score of W queries, so that no sum or maximum goes
 * across a vector. `out`, whose rows are `ld_out` apart, and for the way back each query's greatest score and one over
 * its sum, `kept`, shape (query heads, tokens) each, `apart` from each other. Records are [starts[i], starts[i + 1]).
 * `memory` has `attention_room`, and zeros at first. */
static void attend(const float *q, const float *k, const float *v, const float *cosines, const float *sines,
                   const int64_t *starts, count records, float *out, float *kept, count apart, count tokens,
                   count heads, count share, count width, count ld_in, count ld_out, float scale, count longest,
                        float *memory) {
  const count most = UP(longest, W) + W, wide = UP(width, W);
  float *keys = memory, *values = keys + wide * most, *asked = values + wide * most, *turned = asked + QUERIES * wide,
        *mixed = turned + QUERIES * wide, *scores = mixed + QUERIES * wide;
  for (count record = 0; record < records; record++) {
    const count start = starts[record], length = starts[record + 1] - start;
    for (count head = 0; head < heads; head++) {
      const count column = head * width;
      rotated(k + start * ld_in + column, ld_in, keys, wide, cosines, sines, 0, length, width, 1.0f, 0);
      copied(v + start * ld_in + column, ld_in, values, wide, length, width);
      for (count own = head * share; own < (head + 1) * share; own++)
        for (count first = 0; first < length; first += QUERIES) {
          const count rows = length - first < QUERIES ? length - first : QUERIES;
          rotated(q + (start + first) * ld_in + own * width, ld_in, asked, wide, cosines, sines, first, rows, width,
                  scale, 0);
          transposed(asked, wide, turned, QUERIES, rows, width);
          for (count row = 0; row < rows; row += W) {
            const count at = first + row, seen = at + W < length ? at + W : length;
            const count here = rows - row < W ? rows - row : W;
            against(keys, wide, turned + row, QUERIES, scores, W, seen, width);
            no_later(scores + at * W, W, seen - at);
            vec best = load(scores), sums = {0};
            for (count key = 1; key < seen; key++) best = greater(load(scores + key * W), best);
            for (count key = 0; key < seen; key++) {
              const vec e = exponential(load(scores + key * W) - best);
              sums += e;
              store(scores + key * W, e);
            }
            float share_of[W], greatest[W];
            store(share_of, 1.0f / sums);
            store(greatest, best);
            memcpy(kept + own * tokens + start + at, greatest, sizeof(float) * (size_t)here);
            memcpy(kept + apart + own * tokens + start + at, share_of, sizeof(float) * (size_t)here);
            for (count r = 0; r < here; r += ROWS) {
              const count until = at + r + ROWS < length ? at + r + ROWS : length;
              strip(ROWS, 0, scores + r, 1, W, values, wide, mixed, wide, wide, 0, until);
              for (count i = r; i < here && i < r + ROWS; i++) {
                float *to = out + (start + at + i) * ld_out + own * width;
                const float *from = mixed + (i - r) * wide;
                count j = 0;
                for (; j + W <= width; j += W) store(to + j, load(from + j) * share_of[i]);
                for (; j < width; j++) to[j] = from[j] * share_of[i];
              }
            }
          }
        }
    }
  }
}

/* Gradients at q, k and v, `to_q`, `to_k` (not where it is NULL) and `to_v`, from `back` at the result of `attend`,
 * whose rows are `ld_out` apart. */
static void attend_back(const float *q, const float *k, const float *v, const float *cosines, const float *sines,
                        const int64_t *starts, count records, const float *kept, count apart, count tokens,
                        const float *back, float *to_q, float *to_k, float *to_v, count heads, count share,
                        count width, count ld_in, count ld_out, float scale, count longest,
                        float *memory) {
  const count most = UP(longest, W) + W, wide = UP(width, W);
  float *keys = memory, *values = keys + wide * most, *for_keys = values + wide * most,
        *for_values = for_keys + wide * most, *asked = for_values + wide * most, *given = asked + QUERIES * wide,
        *for_asked = given + QUERIES * wide, *turned = for_asked + QUERIES * wide,
        *given_turned = turned + QUERIES * wide, *chances = given_turned + QUERIES * wide,
        *slopes = chances + QUERIES * most;
  for (count record = 0; record < records; record++) {
    const count start = starts[record], length = starts[record + 1] - start;
    for (count head = 0; head < heads; head++) {
      const count column = head * width;
      rotated(k + start * ld_in + column, ld_in, keys, wide, cosines, sines, 0, length, width, 1.0f, 0);
      copied(v + start * ld_in + column, ld_in, values, wide, length, width);
      memset(for_keys, 0, sizeof(float) * (size_t)(length * wide));
      memset(for_values, 0, sizeof(float) * (size_t)(length * wide));
      for (count own = head * share; own < (head + 1) * share; own++)
        for (count first = 0; first < length; first += QUERIES) {
          const count rows = length - first < QUERIES ? length - first : QUERIES;
          const count last = first + rows;
          rotated(q + (start + first) * ld_in + own * width, ld_in, asked, wide, cosines, sines, first, rows, width,
                  scale, 0);
          copied(back + (start + first) * ld_out + own * width, ld_out, given, wide, rows, width);
          transposed(asked, wide, turned, QUERIES, rows, width);
          transposed(given, wide, given_turned, QUERIES, rows, width);
          for (count row = 0; row < rows; row += W) { /* W queries beside each other, every key below the other */
            const count at = first + row, seen = at + W < length ? at + W : length;
            const count here = rows - row < W ? rows - row : W;
            float *chance = chances + row, *slope = slopes + row;
            float greatest[W] = {0}, share_of[W] = {0};
            memcpy(greatest, kept + own * tokens + start + at, sizeof(float) * (size_t)here);
            memcpy(share_of, kept + apart + own * tokens + start + at, sizeof(float) * (size_t)here);
            const vec best = load(greatest), by = load(share_of);
            against(keys, wide, turned + row, QUERIES, chance, QUERIES, seen, width);
            against(values, wide, given_turned + row, QUERIES, slope, QUERIES, seen, width);
            no_later(chance + at * QUERIES, QUERIES, seen - at);
            vec mean = {0};
            for (count key = 0; key < seen; key++) {
              const vec e = exponential(load(chance + key * QUERIES) - best) * by;
              mean += e * load(slope + key * QUERIES);
              store(chance + key * QUERIES, e);
            }
            for (count key = 0; key < seen; key++)
              store(slope + key * QUERIES, load(chance + key * QUERIES) * (load(slope + key * QUERIES) - mean));
            for (count r = 0; r < here; r += ROWS) {
              const count until = at + r + ROWS < length ? at + r + ROWS : length;
              strip(ROWS, 0, slope + r, 1, QUERIES, keys, wide, for_asked + (row + r) * wide, wide, wide, 0, until);
            }
          }
          for (count key = 0; key < last; key += ROWS) { /* what these queries say about keys and values */
            const count from = key > first ? key - first : 0, here = last - key < ROWS ? last - key : ROWS;
            const float *chance = chances + key * QUERIES, *slope = slopes + key * QUERIES;
            strips_onto(chance, QUERIES, 1, given, wide, for_values + key * wide, wide, here, wide, from, rows);
            if (to_k) strips_onto(slope, QUERIES, 1, asked, wide, for_keys + key * wide, wide, here, wide, from, rows);
          }
          rotated(for_asked, wide, to_q + (start + first) * ld_in + own * width, ld_in, cosines, sines, first, rows,
                  width, scale, 1);
        }
      copied(for_values, wide, to_v + start * ld_in + column, ld_in, length, width);
      if (to_k)
        rotated(for_keys, wide, to_k + start * ld_in + column, ld_in, cosines, sines, 0, length, width,
                1.0f, 1);
    }
  }
}

/* `attend` by itself; `kept` has shape (2, query heads, tokens). Returns 0, or 1 where there is no memory. */
int attention_forward(const float *q, const float *k, const float *v, const float *cosines, const float *sines,
                      const int64_t *starts, count records, float *out, float *kept, count heads, count share,
                      count width, count ld_in, count ld_out, float scale) {
  const count longest = longest_of(starts, records), tokens = starts[records];
  float *memory = calloc((size_t)attention_room(longest, width), sizeof(float));
  if (!memory) return 1;
  attend(q, k, v, cosines, sines, starts, records, out, kept, heads * share * tokens, tokens, heads, share, width, ld_in,
         ld_out, scale, longest, memory);
  free(memory);
  return 0;
}

int attention_backward(const float *q, const float *k, const float *v, const float *cosines, const float *sines,
                       const int64_t *starts, count records, const float *kept, const float *back, float *to_q,
                       float *to_k, float *to_v, count heads, count share, count width, count ld_in, count ld_out,
                       float scale) {
  const count longest = longest_of(starts, records), tokens = starts[records];
  float *memory = calloc((size_t)attention_room(longest, width), sizeof(float));
  if (!memory) return 1;
  attend_back(q, k, v, cosines, sines, starts, records, kept, heads * share * tokens, tokens, back, to_q, to_k, to_v,
              heads, share, width, ld_in, ld_out, scale, longest, memory);
  free(memory);
  return 0;
}

int vector_width(void) { return W; }

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
    strips(x + start * ldx, ldx, 1, down, wide, here, wide, rows, wide, 0, inputs);
    strips_onto(here, wide, 1, up, outputs, y + start * ldy, ldy, rows, outputs, 0, rank);
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
    strips(back + start * ldb, ldb, 1, up, wide, to_low, wide, rows, wide, 0, outputs);
    if (toward)
      strips_onto(to_low, wide, 1, a + user * step_a, inputs, toward + start * inputs, inputs, rows, inputs, 0, rank);
    for (; runs[run] < end; run++) {
      const count first = runs[run], length = runs[run + 1] - first;
      strips(to_low + (first - start) * wide, 1, wide, x + first * ldx, ldx, to_a + run * rank * inputs, inputs,
             rank, inputs, 0, length);
      strips(low + first * wide, 1, wide, back + first * ldb, ldb, turned, outputs, rank, outputs, 0, length);
      transposed(turned, outputs, to_b + run * rank * outputs, rank, rank, outputs);
    }
  }
  free(memory);
  return 0;
}
