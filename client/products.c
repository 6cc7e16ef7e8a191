/* A small Llama's matrix products, and what stands between them, over blocks of rows that stay in a core's second
 * cache: norms, the gated activation and the loss work on what the product beside them has just left there.
 *
 * A matrix is laid out in panels beforehand: PANEL columns at a time, row by row, zeros where the last panel has none.
 * A tile of sums, TILE rows of one panel, stays in registers over the whole depth, as in Goto and van de Geijn (2008),
 * "Anatomy of High-Performance Matrix Multiplication". client/native_products.py lays out, checks and calls.
 */
#include "kernels.c"

enum { PANEL = 2 * W, TILE = W == 16 ? 14 : 6, BLOCK = TILE * (W == 16 ? 8 : 16), DEPTH = 256 };

/* sums = TILE rows of A times one panel over `depth`. */
INLINE void tile_product(vec sums[TILE][2], const float *a, count lda, const float *panel, count depth) {
#pragma GCC unroll 14
  for (int r = 0; r < TILE; r++) sums[r][0] = sums[r][1] = (vec){0};
  for (count k = 0; k < depth; k++) {
    const vec left = load(panel + k * PANEL), right = load(panel + k * PANEL + W);
#pragma GCC unroll 14
    for (int r = 0; r < TILE; r++) {
      const float factor = a[r * lda + k];
      sums[r][0] += factor * left;
      sums[r][1] += factor * right;
    }
  }
}

/* The rows of a block's last tile lie in `tail` where there are fewer than TILE, so that nothing beyond is read. */
INLINE void copy_tail(const float *a, count lda, count rows, count depth, float *tail) {
  const count whole = rows / TILE * TILE;
  for (count row = whole; row < rows; row++)
    memcpy(tail + (row - whole) * depth, a + row * lda, sizeof(float) * (size_t)depth);
}

/* out = beside + A B for one block; A is readable up to a multiple of TILE rows where `tail` is NULL. `beside` may be
 * NULL; its rows are as far apart as those of `out`, and it may be `out`. */
static void block_product(const float *a, count lda, const float *b, count depth, count columns, const float *beside,
                          float *out, count ldo, count rows, float *tail) {
  if (tail && rows % TILE) copy_tail(a, lda, rows, depth, tail);
  for (count from = 0; from < depth; from += DEPTH) {
    const count deep = depth - from < DEPTH ? depth - from : DEPTH;
    const float *onto = from ? out : beside;
    for (count j = 0; j < columns; j += PANEL)
      for (count i = 0; i < rows; i += TILE) {
        const int own = tail && i + TILE > rows;
        vec sums[TILE][2];
        tile_product(sums, own ? tail + from : a + i * lda + from, own ? depth : lda, b + j * depth + from * PANEL,
                     deep);
        float *to = out + i * ldo + j;
        const float *with = onto ? onto + i * ldo + j : NULL;
        if (i + TILE <= rows && j + PANEL <= columns) {
#pragma GCC unroll 14
          for (int r = 0; r < TILE; r++) {
            if (with) {
              sums[r][0] += load(with + r * ldo);
              sums[r][1] += load(with + r * ldo + W);
            }
            store(to + r * ldo, sums[r][0]);
            store(to + r * ldo + W, sums[r][1]);
          }
          continue;
        }
        float corner[TILE][PANEL];
#pragma GCC unroll 14
        for (int r = 0; r < TILE; r++) {
          store(corner[r], sums[r][0]);
          store(corner[r] + W, sums[r][1]);
        }
        const count high = rows - i < TILE ? rows - i : TILE, wide = columns - j < PANEL ? columns - j : PANEL;
        for (count r = 0; r < high; r++)
          for (count c = 0; c < wide; c++) to[r * ldo + c] = with ? with[r * ldo + c] + corner[r][c] : corner[r][c];
      }
  }
}

int panel_width(void) { return PANEL; }

/* out = beside + a b; B in panels, `beside` as in `block_product`. Returns 0, or 1 where there is no memory. */
int product(const float *a, count lda, const float *b, const float *beside, float *out, count ldo, count rows,
            count depth, count columns) {
  float *tail = calloc((size_t)(TILE * depth), sizeof(float));
  if (!tail) return 1;
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    block_product(a + i * lda, lda, b, depth, columns, beside ? beside + i * ldo : NULL, out + i * ldo, ldo, here,
                  tail);
  }
  free(tail);
  return 0;
}

/* inner = norm(x), with `scale` as in `rms_forward`, and out = inner b. `inner` may be NULL. */
int norm_product(const float *x, const float *weight, const float *b, float *inner, float *scale, float *out,
                 count rows, count width, count columns, float epsilon) {
  float *normed = calloc((size_t)(BLOCK * width), sizeof(float));
  if (!normed) return 1;
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    rms_forward(x + i * width, weight, normed, scale + i, here, width, epsilon);
    block_product(normed, width, b, width, columns, NULL, out + i * columns, columns, here, NULL);
    if (inner) memcpy(inner + i * width, normed, sizeof(float) * (size_t)(here * width));
  }
  free(normed);
  return 0;
}

/* out = x + (silu(gates) * ups) downs, with gates and ups of norm(x). Panels of `gates_ups` hold W gates and the W ups
 * that go with them. Only `scale` is kept: to find gates and ups again costs less than to fetch them from memory. */
int mlp_forward(const float *x, const float *weight, const float *gates_ups, const float *downs, float *scale,
                float *out, count rows, count width, count inner, float epsilon) {
  const count wide = UP(inner, PANEL);
  float *normed = calloc((size_t)(BLOCK * (width + wide)), sizeof(float));
  if (!normed) return 1;
  float *product = normed + BLOCK * width;
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    rms_forward(x + i * width, weight, normed, scale + i, here, width, epsilon);
    for (count j = 0; j < wide; j += W)
      for (count t = 0; t < here; t += TILE) {
        vec sums[TILE][2];
        tile_product(sums, normed + t * width, width, gates_ups + 2 * j * width, width);
#pragma GCC unroll 14
        for (int r = 0; r < TILE; r++)
          store(product + (t + r) * wide + j, sums[r][0] * sigmoid(sums[r][0]) * sums[r][1]);
      }
    block_product(product, wide, downs, inner, width, x + i * width, out + i * width, width, here, NULL);
  }
  free(normed);
  return 0;
}

/* out = back + gradient at x of `mlp_forward`; `downs_back` and `gates_ups_back` are laid out for the way back. */
int mlp_backward(const float *back, const float *x, const float *scale, const float *weight, const float *gates_ups,
                 const float *downs_back, const float *gates_ups_back, float *out, count rows, count width,
                 count inner) {
  const count wide = UP(inner, PANEL);
  float *both = calloc((size_t)(BLOCK * (2 * wide + width) + TILE * width), sizeof(float));
  if (!both) return 1;
  float *normed = both + BLOCK * 2 * wide, *tail = normed + BLOCK * width;
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    const float *given = back + i * width;
    for (count r = 0; r < here; r++)
      for (count c = 0; c < width; c++) normed[r * width + c] = x[(i + r) * width + c] * scale[i + r] * weight[c];
    if (here % TILE) copy_tail(given, width, here, width, tail);
    for (count j = 0; j < wide; j += W)
      for (count t = 0; t < here; t += TILE) {
        vec sums[TILE][2];
        tile_product(sums, normed + t * width, width, gates_ups + 2 * j * width, width);
#pragma GCC unroll 14
        for (int r = 0; r < TILE; r++) {
          store(both + (t + r) * 2 * wide + j, sums[r][0]);
          store(both + (t + r) * 2 * wide + wide + j, sums[r][1]);
        }
      }
    for (count j = 0; j < wide; j += PANEL)
      for (count t = 0; t < here; t += TILE) {
        vec sums[TILE][2];
        tile_product(sums, t + TILE > here ? tail : given + t * width, width, downs_back + j * width, width);
#pragma GCC unroll 14
        for (int r = 0; r < TILE; r++) {
          float *gate = both + (t + r) * 2 * wide + j, *up = gate + wide;
          gate_back(sums[r][0], load(gate), load(up), gate, up);
          gate_back(sums[r][1], load(gate + W), load(up + W), gate + W, up + W);
        }
      }
    block_product(both, 2 * wide, gates_ups_back, 2 * wide, width, NULL, normed, width, here, NULL);
    rms_backward(normed, x + i * width, scale + i, weight, given, out + i * width, here, width);
  }
  free(both);
  return 0;
}

/* Gradient at `hidden` of weighted cross-entropy under the output layer `head`, in panels for both ways. */
int loss_product(const float *hidden, const float *head, const float *head_back, const int64_t *targets,
                 const float *weights, float *gradient, count rows, count width, count vocabulary) {
  const count apart = UP(vocabulary, PANEL) + W; /* rows do not fall on the same lines of the first cache */
  float *logits = calloc((size_t)(BLOCK * apart + TILE * width), sizeof(float));
  if (!logits) return 1;
  float *tail = logits + BLOCK * apart;
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    block_product(hidden + i * width, width, head, width, vocabulary, NULL, logits, apart, here, tail);
    for (count r = 0; r < here; r++) loss_backward(logits + r * apart, targets + i + r, weights + i + r, 1, vocabulary);
    block_product(logits, apart, head_back, vocabulary, width, NULL, gradient + i * width, width, here, NULL);
  }
  free(logits);
  return 0;
}
