/* A small Llama's matrix products, and what stands between them, over blocks of rows that stay in a core's second
 * cache: norms, the gated activation and the loss work on what the product beside them has just left there.
 *
 * A matrix is laid out in panels beforehand: PANEL columns at a time, row by row, zeros where the last panel has none.
 * A tile of sums, TILE rows of one panel, stays in registers over the whole depth, as in Goto and van de Geijn (2008),
 * "Anatomy of High-Performance Matrix Multiplication". client/native_products.py lays out, checks and calls.
 */
#include "kernels.c"

/* Vectors of a panel's row; a tile's rows; rows of a block; and as deep a panel as stays in the first cache. */
enum { V = W == 16 ? 4 : 2, PANEL = V * W, HALF = PANEL / 2, TILE = 6, BLOCK = 20 * TILE, DEPTH = 8192 / PANEL };

/* A times a panel of B, and what is added to that. */
struct term {
  const float *a;
  count lda;
  const float *panel;
  count depth;
  const struct term *next;
};

/* What becomes of a tile's sums: they are stored; stored onto what is beside; gates and ups of one panel become one
 * product, or are stored `apart` from each other; a gradient at that product becomes those at gate and up. */
enum { SET, ONTO, GATED, SPLIT, GATE_BACK };

INLINE void step(const int rows, const int wide, vec sums[TILE][V], const float *a, count lda, const float *panel) {
  vec b[V];
#pragma GCC unroll 4
  for (int v = 0; v < wide; v++) b[v] = load(panel + v * W);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    const float factor = a[r * lda];
#pragma GCC unroll 4
    for (int v = 0; v < wide; v++) sums[r][v] += factor * b[v];
  }
}

INLINE void add_term(const int rows, const int wide, vec sums[TILE][V], const struct term *of, count row) {
  const float *a = of->a + row * of->lda, *panel = of->panel, *last = a + of->depth;
  const count lda = of->lda;
  for (; a + 2 <= last; a += 2, panel += 2 * PANEL) {
    step(rows, wide, sums, a, lda, panel);
    step(rows, wide, sums, a + 1, lda, panel + PANEL);
  }
  if (a < last) step(rows, wide, sums, a, lda, panel);
}

/* `rows` rows from `row` on of one panel's product; `valid` columns of it exist. */
INLINE void tile_of(const int kind, const int rows, const int wide, const struct term *term, float *to, count ldt,
                    const float *beside, count apart, count row, count valid) {
  vec sums[TILE][V];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < wide; v++) sums[r][v] = (vec){0};
  for (; term; term = term->next) add_term(rows, wide, sums, term, row);
  to += row * ldt;
  if (kind == ONTO) beside += row * ldt;
  if ((kind == SET || kind == ONTO) && valid < wide * W) {
    float corner[PANEL];
    for (int r = 0; r < rows; r++, to += ldt) {
#pragma GCC unroll 4
      for (int v = 0; v < wide; v++) store(corner + v * W, sums[r][v]);
      for (count c = 0; c < valid; c++) to[c] = kind == ONTO ? beside[r * ldt + c] + corner[c] : corner[c];
    }
    return;
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++, to += ldt) {
#pragma GCC unroll 4
    for (int v = 0; v < wide; v++) {
      if (kind == SET) store(to + v * W, sums[r][v]);
      if (kind == ONTO) store(to + v * W, load(beside + r * ldt + v * W) + sums[r][v]);
      if (kind == SPLIT) store(to + (v < V / 2 ? v * W : apart + (v - V / 2) * W), sums[r][v]);
      if (kind == GATED && v < V / 2) store(to + v * W, sums[r][v] * sigmoid(sums[r][v]) * sums[r][v + V / 2]);
      if (kind == GATE_BACK)
        gate_back(sums[r][v], load(to + v * W), load(to + apart + v * W), to + v * W, to + apart + v * W);
    }
  }
}

INLINE void panel_of(const int kind, const int wide, const struct term *term, float *to, count ldt, const float *beside,
                     count apart, count rows, count valid) {
  count row = 0;
  for (; row + TILE <= rows; row += TILE) tile_of(kind, TILE, wide, term, to, ldt, beside, apart, row, valid);
  if (row + 4 <= rows) {
    tile_of(kind, 4, wide, term, to, ldt, beside, apart, row, valid);
    row += 4;
  }
  if (row + 2 <= rows) {
    tile_of(kind, 2, wide, term, to, ldt, beside, apart, row, valid);
    row += 2;
  }
  if (row < rows) tile_of(kind, 1, wide, term, to, ldt, beside, apart, row, valid);
}

/* One panel's product over all rows of a block. */
#define PANEL_AS(name, kind, wide)                                                                               \
  APART void name(const struct term *term, float *to, count ldt, const float *beside, count apart, count rows,  \
                  count valid) {                                                                                 \
    panel_of(kind, wide, term, to, ldt, beside, apart, rows, valid);                                         \
  }
PANEL_AS(panel_set, SET, V)
PANEL_AS(narrow_set, SET, V / 2)
PANEL_AS(panel_onto, ONTO, V)
PANEL_AS(narrow_onto, ONTO, V / 2)
PANEL_AS(panel_gated, GATED, V)
PANEL_AS(panel_split, SPLIT, V)
PANEL_AS(panel_gate_back, GATE_BACK, V)
PANEL_AS(narrow_gate_back, GATE_BACK, V / 2)

/* What each of a matrix's panels gets besides: rows of numbers times panels of `depth` rows each, of which panel p uses
 * those in [from[p], to[p]). */
struct beside {
  const float *a;
  count lda;
  const float *panels;
  count depth;
  const count *from, *to;
};

/* out = onto + A B, and what is `more`, for one block. `onto` and `more` may be NULL; rows of `onto` are as far apart as
 * those of `out`, and it may be `out`. */
static void block_product(const float *a, count lda, const float *b, count depth, count columns, const float *onto,
                          float *out, count ldo, count rows, const struct beside *more) {
  for (count from = 0; from < depth; from += DEPTH) {
    const count deep = depth - from < DEPTH ? depth - from : DEPTH;
    for (count j = 0, p = 0; j < columns; j += PANEL, p++) {
      struct term one = {a + from, lda, b + j * depth + from * PANEL, deep, NULL}, two;
      if (more && from + deep == depth && more->from[p] < more->to[p]) {
        two = (struct term){more->a + more->from[p], more->lda, more->panels + (p * more->depth + more->from[p]) * PANEL,
                            more->to[p] - more->from[p], NULL};
        one.next = &two;
      }
      const float *with = from ? out : onto;
      const count valid = columns - j < PANEL ? columns - j : PANEL;
      if (with)
        (valid > HALF ? panel_onto : narrow_onto)(&one, out + j, ldo, with + j, 0, rows, valid);
      else
        (valid > HALF ? panel_set : narrow_set)(&one, out + j, ldo, NULL, 0, rows, valid);
    }
  }
}

int panel_width(void) { return PANEL; }

/* out = onto + a b; B in panels, `onto` as in `block_product`. Returns 0. */
int product(const float *a, count lda, const float *b, const float *onto, float *out, count ldo, count rows,
            count depth, count columns) {
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    block_product(a + i * lda, lda, b, depth, columns, onto ? onto + i * ldo : NULL, out + i * ldo, ldo, here, NULL);
  }
  return 0;
}

/* inner = norm(x), with `scale` as in `rms_forward`, and out = inner b. `inner` may be NULL. Returns 0, or 1 where there
 * is no memory, as everything below does. */
int norm_product(const float *x, const float *weight, const float *b, float *inner, float *scale, float *out,
                 count rows, count width, count columns, float epsilon) {
  float *normed = malloc(sizeof(float) * (size_t)(BLOCK * width));
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

/* Numbers of working memory for an MLP of `rows` rows, there and back. */
INLINE count mlp_room(count rows, count width, count inner) { return rows * (width + 2 * UP(inner, HALF)); }

/* out = x + (silu(gates) * ups) downs, with gates and ups of norm(x), for one block. Panels of `gates_ups` hold HALF
 * gates and the HALF ups that go with them. Only `scale` is kept: to find gates and ups again costs less than to fetch
 * them from memory. */
static void mlp_block(const float *x, const float *weight, const float *gates_ups, const float *downs, float *scale,
                      float *out, count rows, count width, count inner, float epsilon, float *memory) {
  const count wide = UP(inner, HALF);
  float *normed = memory, *product = normed + rows * width;
  rms_forward(x, weight, normed, scale, rows, width, epsilon);
  for (count j = 0; j < wide; j += HALF) {
    const struct term one = {normed, width, gates_ups + 2 * j * width, width, NULL};
    panel_gated(&one, product + j, wide, NULL, 0, rows, PANEL);
  }
  block_product(product, wide, downs, inner, width, x, out, width, rows, NULL);
}

INLINE void normed_again(const float *x, const float *scale, const float *weight, float *normed, count rows,
                         count width) {
  for (count r = 0; r < rows; r++) {
    const float by = scale[r];
    for (count c = 0; c < width; c++) normed[r * width + c] = x[r * width + c] * by * weight[c];
  }
}

/* out = back + gradient at x of `mlp_block`; `downs_back` and `gates_ups_back` are laid out for the way back. */
static void mlp_back_block(const float *back, const float *x, const float *scale, const float *weight,
                           const float *gates_ups, const float *downs_back, const float *gates_ups_back, float *out,
                           count rows, count width, count inner, float *memory) {
  const count wide = UP(inner, HALF);
  float *normed = memory, *both = normed + rows * width;
  normed_again(x, scale, weight, normed, rows, width);
  for (count j = 0; j < wide; j += HALF) {
    const struct term one = {normed, width, gates_ups + 2 * j * width, width, NULL};
    panel_split(&one, both + j, 2 * wide, NULL, wide, rows, PANEL);
  }
  for (count j = 0; j < wide; j += PANEL) {
    const struct term one = {back, width, downs_back + j * width, width, NULL};
    (wide - j > HALF ? panel_gate_back : narrow_gate_back)(&one, both + j, 2 * wide, NULL, wide, rows, PANEL);
  }
  block_product(both, 2 * wide, gates_ups_back, 2 * wide, width, NULL, normed, width, rows, NULL);
  rms_backward(normed, x, scale, weight, back, out, rows, width);
}

int mlp_forward(const float *x, const float *weight, const float *gates_ups, const float *downs, float *scale,
                float *out, count rows, count width, count inner, float epsilon) {
  float *memory = malloc(sizeof(float) * (size_t)mlp_room(BLOCK, width, inner));
  if (!memory) return 1;
  for (count i = 0; i < rows; i += BLOCK)
    mlp_block(x + i * width, weight, gates_ups, downs, scale + i, out + i * width, rows - i < BLOCK ? rows - i : BLOCK,
              width, inner, epsilon, memory);
  free(memory);
  return 0;
}

int mlp_backward(const float *back, const float *x, const float *scale, const float *weight, const float *gates_ups,
                 const float *downs_back, const float *gates_ups_back, float *out, count rows, count width,
                 count inner) {
  float *memory = malloc(sizeof(float) * (size_t)mlp_room(BLOCK, width, inner));
  if (!memory) return 1;
  for (count i = 0; i < rows; i += BLOCK)
    mlp_back_block(back + i * width, x + i * width, scale + i, weight, gates_ups, downs_back, gates_ups_back,
                   out + i * width, rows - i < BLOCK ? rows - i : BLOCK, width, inner, memory);
  free(memory);
  return 0;
}

/* Gradient at `hidden` of weighted cross-entropy under the output layer `head`, in panels for both ways. */
int loss_product(const float *hidden, const float *head, const float *head_back, const int64_t *targets,
                 const float *weights, float *gradient, count rows, count width, count vocabulary) {
  const count apart = UP(vocabulary, W) + W; /* rows do not fall on the same lines of the first cache */
  float *logits = malloc(sizeof(float) * (size_t)(BLOCK * apart));
  if (!logits) return 1;
  for (count i = 0; i < rows; i += BLOCK) {
    const count here = rows - i < BLOCK ? rows - i : BLOCK;
    block_product(hidden + i * width, width, head, width, vocabulary, NULL, logits, apart, here, NULL);
    for (count r = 0; r < here; r++) loss_backward(logits + r * apart, targets + i + r, weights + i + r, 1, vocabulary);
    block_product(logits, apart, head_back, vocabulary, width, NULL, gradient + i * width, width, here, NULL);
  }
  free(logits);
  return 0;
}
