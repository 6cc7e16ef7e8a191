/* One decoder layer of a small Llama in one call, there and back: whole records, about BLOCK rows at a time, go through
 * norm, queries, keys and values with the users' own low-rank products, rotary attention, output and MLP while they
 * lie in a core's second cache. client/native_layers.py lays out, checks and calls.
 */
#include "products.c"

enum { PARTS = 3, BLOCK_BACK = 64 }; /* queries, keys, values; rows of a block on the way back, which needs more room */

/* A layer's matrices in panels (see native_products.LaidLayer), and its sizes; `bias` of queries, keys and values side
 * by side, or NULL. */
struct layer {
  const float *first_norm, *second_norm, *qkv, *bias, *output, *gates_ups, *down, *qkv_back, *output_back,
      *gates_ups_back, *down_back;
  count width, inner, heads, share, each;
  float epsilon;
};

/* Where records and users begin, and the end, and each position's angles. */
struct rows {
  const int64_t *records, *users;
  count record_count, user_count;
  const float *cosines, *sines;
};

/* The users' factors over queries, keys and values: user i has A at a[part] + i * step_a[part], shape (rank, width), and
 * B at b[part] + i * step_b[part], shape (outputs, rank); NULL where a part has none. */
struct own {
  const float *a[PARTS], *b[PARTS];
  count step_a[PARTS], step_b[PARTS];
  count rank;
};

/* What the way back needs of the way there. `low` has UP(adapted parts * rank, W) numbers per row. */
struct kept {
  float *scale, *qkv, *attention, *low, *added, *second_scale;
};

/* Where gradients of the factors go, added: each run's beside those of the part's others. */
struct gradients {
  float *a[PARTS], *b[PARTS];
  count step_a[PARTS], step_b[PARTS];
  const int64_t *runs;
  float scaling; /* of those of B */
};

/* Sizes that follow from a layer's, and the columns [at[part], at[part + 1]) of queries, keys and values. */
struct sizes {
  count across, columns, panels, adapted, lows, wide, at[PARTS + 1], slot[PARTS];
};

static struct sizes sizes_of(const struct layer *l, const struct own *own) {
  struct sizes s = {.across = l->heads * l->share * l->each};
  const count keys = l->heads * l->each;
  s.at[1] = s.across;
  s.at[2] = s.across + keys;
  s.at[3] = s.columns = s.across + 2 * keys;
  s.panels = UP(s.columns, PANEL) / PANEL;
  for (int part = 0; part < PARTS; part++) s.slot[part] = own && own->a[part] ? own->rank * s.adapted++ : -1;
  s.lows = own ? own->rank * s.adapted : 0;
  s.wide = UP(s.lows, W);
  return s;
}

/* One user's factors as products take them. */
struct laid {
  float *down;   /* (width, wide): every A, turned, beside the others */
  float *up;     /* panels of (lows, columns): every B, turned, in its own columns */
  float *up_low; /* (columns, wide): every B in its own columns of lows */
  float *down_x; /* panels of (lows, width): every A below the others */
  count *from, *to, *all_from, *all_to;
};

static int room_for(struct laid *laid, const struct layer *l, const struct sizes *s) {
  const count inside = UP(l->width, PANEL) / PANEL;
  const count numbers = s->wide * l->width + s->wide * s->columns + (s->lows + 1) * PANEL * (s->panels + inside);
  laid->down = calloc((size_t)numbers, sizeof(float));
  laid->from = calloc((size_t)(2 * (s->panels + inside)), sizeof(count));
  if (!laid->down || !laid->from) return 1;
  laid->up_low = laid->down + s->wide * l->width;
  laid->up = laid->up_low + s->wide * s->columns;
  laid->down_x = laid->up + (s->lows + 1) * PANEL * s->panels;
  laid->to = laid->from + s->panels;
  laid->all_from = laid->to + s->panels;
  laid->all_to = laid->all_from + inside;
  for (count p = 0; p < inside; p++) laid->all_to[p] = s->lows;
  return 0;
}

static void give_back(struct laid *laid) {
  free(laid->down);
  free(laid->from);
}

static void lay_there(const struct laid *laid, const struct layer *l, const struct own *own, const struct sizes *s,
                      count user) {
  for (count p = 0; p < s->panels; p++) laid->from[p] = s->lows, laid->to[p] = 0;
  for (int part = 0; part < PARTS; part++) {
    const count slot = s->slot[part], rank = own->rank;
    if (slot < 0) continue;
    const float *b = own->b[part] + user * own->step_b[part];
    transposed(own->a[part] + user * own->step_a[part], l->width, laid->down + slot, s->wide, rank, l->width);
    for (count c = s->at[part]; c < s->at[part + 1]; c++, b += rank) {
      const count p = c / PANEL;
      float *column = laid->up + (p * s->lows + slot) * PANEL + c % PANEL;
      for (count r = 0; r < rank; r++) column[r * PANEL] = b[r];
      if (slot < laid->from[p]) laid->from[p] = slot;
      if (slot + rank > laid->to[p]) laid->to[p] = slot + rank;
    }
  }
}

static void lay_back(const struct laid *laid, const struct layer *l, const struct own *own, const struct sizes *s,
                     count user) {
  for (int part = 0; part < PARTS; part++) {
    const count slot = s->slot[part], rank = own->rank;
    if (slot < 0) continue;
    const float *a = own->a[part] + user * own->step_a[part], *b = own->b[part] + user * own->step_b[part];
    for (count c = s->at[part]; c < s->at[part + 1]; c++, b += rank)
      memcpy(laid->up_low + c * s->wide + slot, b, sizeof(float) * (size_t)rank);
    for (count r = 0; r < rank; r++, a += l->width)
      for (count c = 0; c < l->width; c += PANEL)
        memcpy(laid->down_x + (c / PANEL * s->lows + slot + r) * PANEL, a + c,
               sizeof(float) * (size_t)(l->width - c < PANEL ? l->width - c : PANEL));
  }
}

/* C = A B where B's rows are `columns` numbers, a multiple of W. */
static void narrow_product(const float *a, count lda, const float *b, float *c, count rows, count columns, count depth) {
  for (count j = 0; j < columns; j += W) against(a, lda, b + j, columns, c + j, columns, rows, depth);
}

/* The records from `record` on that make a block, and where they begin within it; at least one. */
static count block_from(const struct rows *rows, count record, count most, count *starts) {
  const int64_t *at = rows->records + record;
  count taken = 1;
  while (record + taken < rows->record_count && taken < most && at[taken + 1] - at[0] <= most) taken++;
  for (count i = 0; i <= taken; i++) starts[i] = at[i] - at[0];
  return taken;
}

/* `out` is the states after the layer, from `x` before it. Returns 0, or 1 where there is no memory. */
int layer_forward(const struct layer *l, const struct rows *rows, const struct own *own, const float *x,
                  const struct kept *kept, float *out) {
  const struct sizes s = sizes_of(l, own);
  const count width = l->width, heads = l->heads * l->share, tokens = rows->records[rows->record_count];
  const count longest = longest_of(rows->records, rows->record_count), most = longest > BLOCK ? longest : BLOCK;
  const count inside = mlp_room(most, width, l->inner), attending = attention_room(longest, l->each);
  struct laid laid = {0};
  count starts[BLOCK + 1], user = -1;
  float *memory = malloc(sizeof(float) * (size_t)(inside + most * s.across + attending));
  const int without = !memory || room_for(&laid, l, &s);
  float *normed = memory, *mixed = memory + inside, *attention = mixed + most * s.across;
  if (!without) memset(attention, 0, sizeof(float) * (size_t)attending);
  for (count record = 0, taken; !without && record < rows->record_count; record += taken) {
    taken = block_from(rows, record, BLOCK, starts);
    const count first = rows->records[record], here = starts[taken];
    const float *in = x + first * width;
    float *qkv = kept->qkv + first * s.columns, *added = kept->added + first * width;
    rms_forward(in, l->first_norm, normed, kept->scale + first, here, width, l->epsilon);
    for (count row = 0, to; row < here; row = to) {
      to = here;
      struct beside more = {kept->low + (first + row) * s.wide, s.wide, laid.up, s.lows, laid.from, laid.to};
      if (s.adapted) {
        const count before = user;
        while (user < 0 || rows->users[user + 1] <= first + row) user++;
        if (user != before) lay_there(&laid, l, own, &s, user);
        if (rows->users[user + 1] - first < to) to = rows->users[user + 1] - first;
        narrow_product(normed + row * width, width, laid.down, kept->low + (first + row) * s.wide, to - row, s.wide,
                       width);
      }
      block_product(normed + row * width, width, l->qkv, width, s.columns, NULL, qkv + row * s.columns, s.columns,
                    to - row, s.adapted ? &more : NULL);
    }
    if (l->bias)
      for (count row = 0; row < here; row++)
        for (count c = 0; c < s.columns; c++) qkv[row * s.columns + c] += l->bias[c];
    attend(qkv, qkv + s.at[1], qkv + s.at[2], rows->cosines, rows->sines, starts, taken, mixed,
           kept->attention + first, heads * tokens, tokens, l->heads, l->share, l->each, s.columns, s.across,
           1.0f / sqrtf((float)l->each), longest, attention);
    block_product(mixed, s.across, l->output, s.across, width, in, added, width, here, NULL);
    mlp_block(added, l->second_norm, l->gates_ups, l->down, kept->second_scale + first, out + first * width, here,
              width, l->inner, l->epsilon, normed);
  }
  give_back(&laid);
  free(memory);
  return without;
}

/* The gradients of the factors of one user's rows [row, to), which begin at token `first`. */
static void factor_gradients(const struct layer *l, const struct sizes *s, const struct own *own,
                             const struct gradients *found, const float *normed, const float *to_low, const float *low,
                             const float *to_qkv, count first, count row, count to, count *run, float *turned) {
  for (count end; row < to; row = end) {
    while (found->runs[*run + 1] <= first + row) ++*run;
    end = found->runs[*run + 1] - first < to ? found->runs[*run + 1] - first : to;
    for (int part = 0; part < PARTS; part++) {
      const count slot = s->slot[part], rank = own->rank, outputs = s->at[part + 1] - s->at[part];
      if (slot < 0) continue;
      strips_onto(to_low + row * s->wide + slot, 1, s->wide, normed + row * l->width, l->width,
                  found->a[part] + *run * found->step_a[part], l->width, rank, l->width, 0, end - row);
      strips(low + row * s->wide + slot, 1, s->wide, to_qkv + row * s->columns + s->at[part], s->columns, turned,
             outputs, rank, outputs, 0, end - row);
      float *b = found->b[part] + *run * found->step_b[part];
      for (count c = 0; c < outputs; c++, b += rank)
        for (count r = 0; r < rank; r++) b[r] += found->scaling * turned[r * outputs + c];
    }
  }
}

/* `out`, where not NULL, is the gradient at `x` from `back` at the layer's result; gradients of factors are added to
 * `found`, those of B times its scaling. */
int layer_backward(const struct layer *l, const struct rows *rows, const struct own *own, const float *x,
                   const struct kept *kept, const float *back, const struct gradients *found, float *out) {
  const struct sizes s = sizes_of(l, own);
  const count width = l->width, heads = l->heads * l->share, tokens = rows->records[rows->record_count];
  const count longest = longest_of(rows->records, rows->record_count), most = longest > BLOCK_BACK ? longest : BLOCK_BACK;
  const count inside = mlp_room(most, width, l->inner), attending = attention_room(longest, l->each);
  const int keyed = out || s.slot[1] >= 0;
  struct laid laid = {0};
  count starts[BLOCK_BACK + 1], user = -1, run = 0;
  float *memory = malloc(sizeof(float) * (size_t)(inside + most * (2 * width + s.across + s.columns + s.wide) +
                                                  (own ? own->rank : 0) * s.columns + attending));
  const int without = !memory || room_for(&laid, l, &s);
  float *normed = memory, *middle = normed + inside, *inner = middle + most * width, *mixed = inner + most * width,
        *to_qkv = mixed + most * s.across, *to_low = to_qkv + most * s.columns, *turned = to_low + most * s.wide,
        *attention = turned + (own ? own->rank : 0) * s.columns;
  if (!without) memset(attention, 0, sizeof(float) * (size_t)attending);
  for (count record = 0, taken; !without && record < rows->record_count; record += taken) {
    taken = block_from(rows, record, BLOCK_BACK, starts);
    const count first = rows->records[record], here = starts[taken];
    const float *in = x + first * width, *qkv = kept->qkv + first * s.columns;
    mlp_back_block(back + first * width, kept->added + first * width, kept->second_scale + first, l->second_norm,
                   l->gates_ups, l->down_back, l->gates_ups_back, middle, here, width, l->inner, normed);
    block_product(middle, width, l->output_back, width, s.across, NULL, mixed, s.across, here, NULL);
    attend_back(qkv, qkv + s.at[1], qkv + s.at[2], rows->cosines, rows->sines, starts, taken, kept->attention + first,
                heads * tokens, tokens, mixed, to_qkv, keyed ? to_qkv + s.at[1] : NULL, to_qkv + s.at[2], l->heads,
                l->share, l->each, s.columns, s.across, 1.0f / sqrtf((float)l->each), longest, attention);
    if (s.adapted) normed_again(in, kept->scale + first, l->first_norm, normed, here, width);
    for (count row = 0, to; row < here; row = to) {
      to = here;
      float *low = to_low + row * s.wide;
      const struct beside more = {low, s.wide, laid.down_x, s.lows, laid.all_from, laid.all_to};
      if (s.adapted) {
        const count before = user;
        while (user < 0 || rows->users[user + 1] <= first + row) user++;
        if (user != before) lay_back(&laid, l, own, &s, user);
        if (rows->users[user + 1] - first < to) to = rows->users[user + 1] - first;
        int some = 0;
        for (int part = 0; part < PARTS; part++) {
          if (s.slot[part] < 0) continue;
          (some ? strips_onto : strips)(to_qkv + row * s.columns, s.columns, 1, laid.up_low, s.wide, low, s.wide,
                                        to - row, s.wide, s.at[part], s.at[part + 1]);
          some = 1;
        }
        factor_gradients(l, &s, own, found, normed, to_low, kept->low + first * s.wide, to_qkv, first, row, to, &run,
                         turned);
      }
      if (out)
        block_product(to_qkv + row * s.columns, s.columns, l->qkv_back, s.columns, width, NULL, inner + row * width,
                      width, to - row, s.adapted ? &more : NULL);
    }
    if (out)
      rms_backward(inner, in, kept->scale + first, l->first_norm, middle, out + first * width, here, width);
  }
  give_back(&laid);
  free(memory);
  return without;
}
