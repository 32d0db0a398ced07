/* One decoding step of a dense Transformer on CPUs: N tokens in, their keys and values into the cache, logits out.

   A step reads every weight once, so memory's bandwidth is its limit, and the time between two operations its
   overhead. Therefore: products keep a few rows and tokens in registers and widen weights (float32, bfloat16, 8 or 4
   bits) on their way to them; activations and sums are float32; one parallel region spans the whole step, with a
   barrier only where a thread needs what others computed. `native.py` compiles and fills in the structs below, which
   it mirrors field by field. Vectors are GCC's (clang has them too), as wide as the machine's. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define W 16 /* floats in a vector */
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif
#define ROWS 4
#define MOST_TOKENS 4
#define TOKENS (W == 8 ? 2 : MOST_TOKENS) /* ROWS · TOKENS sums stand in registers at once */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef int8_t vi8 __attribute__((vector_size(W)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

enum { F32, BF16, INT8, INT8_GROUPS, INT4 }; /* INT8: one scale a row */
enum { FULL, WINDOW, STRIDED, FIXED };
enum { SWIGLU, GEGLU, GELU, GELU_TANH, RELU2 };

typedef struct {
    const void *weight;     /* (rows, cols) */
    const uint16_t *scales; /* float16 (rows, cols / group) */
    const float *bias;
    int32_t kind, rows, cols, group;
} Matrix;

typedef struct {
    const float *weight, *bias;
} Norm;

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    Norm attention_norm, feedforward_norm, q_norm, k_norm;
    void *keys, *values; /* (blocks, kv_heads, block_size, head_dim) */
    float *key_scales, *value_scales;
    int32_t cache_kind, n_blocks, block_size, ring, ring_sinks;
    int32_t pattern, window, stride, summary, sink_tokens;
} Layer;

typedef struct {
    const Layer *layers;
    Matrix embedding, head;
    Norm norm;
    const float *positions; /* (reach, d_model), added to embeddings */
    const float *cos, *sin; /* (reach, rotated / 2) */
    const float *slopes;    /* ALiBi's, of every head */
    int32_t n_layers, n_heads, n_kv_heads, head_dim, d_model, d_ff, vocab_size, reach, rotated, activation;
    int32_t is_layernorm, is_post_norm, has_qk_norm, table_width;
    float embedding_scale, attention_scale, attention_softcap, logit_softcap, eps; /* softcap 0: none */
} Model;

/* --- vectors ---------------------------------------------------------------------------------------------------- */

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* W small integers to 32 bits. GCC's own conversion of vectors takes several steps. */
#ifdef __AVX512F__
INLINE vi wide_u16(vu16 x) { return (vi)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE vi wide_i8(vi8 x) { return (vi)_mm512_cvtepi8_epi32((__m128i)x); }
INLINE vi wide_u8(vi8 x) { return (vi)_mm512_cvtepu8_epi32((__m128i)x); }
#elif defined(__AVX2__)
INLINE vi wide_u16(vu16 x) { return (vi)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE vi wide_i8(vi8 x) { return (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)x)); }
INLINE vi wide_u8(vi8 x) { return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x)); }
#else
INLINE vi wide_u16(vu16 x) { return __builtin_convertvector(x, vi); }
INLINE vi wide_i8(vi8 x) { return __builtin_convertvector(x, vi); }
INLINE vi wide_u8(vi8 x) { return wide_i8(x) & 255; }
#endif

/* n numbers from index i on, as floats; 0 in the lanes behind them. */
INLINE vf load(const int kind, const void *from, int64_t i, int64_t n)
{
    if (kind == F32) {
        vf x = {0};
        memcpy(&x, (const float *)from + i, n == W ? 4 * W : 4 * n);
        return x;
    }
    if (kind == BF16) {
        vu16 x = {0};
        memcpy(&x, (const uint16_t *)from + i, n == W ? 2 * W : 2 * n);
        return (vf)(wide_u16(x) << 16);
    }
    vi8 x = {0};
    memcpy(&x, (const int8_t *)from + i, n == W ? W : n);
    return __builtin_convertvector(wide_i8(x), vf);
}

INLINE void store(float *to, vf x, int64_t n) { memcpy(to, &x, n == W ? 4 * W : 4 * n); }

INLINE vf where(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE v4 folded(vf x)
{
    v4 part[W / 4];
    memcpy(part, &x, sizeof x);
    for (int i = 1; i < W / 4; i++) part[0] += part[i];
    return part[0];
}

/* The sums of four vectors. */
INLINE v4 sums(vf a, vf b, vf c, vf d)
{
    v4 p = folded(a), q = folded(b), r = folded(c), s = folded(d);
    v4 pq = SHUFFLE(p, q, 0, 4, 1, 5) + SHUFFLE(p, q, 2, 6, 3, 7);
    v4 rs = SHUFFLE(r, s, 0, 4, 1, 5) + SHUFFLE(r, s, 2, 6, 3, 7);
    return SHUFFLE(pq, rs, 0, 1, 4, 5) + SHUFFLE(pq, rs, 2, 3, 6, 7);
}

INLINE float sum(vf x)
{
    v4 s = folded(x);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* e^x = 2^n e^r with |r| <= ln 2 / 2 (polynomial of Cephes); relative error 1e-7 from -87 to 88, held beyond. */
INLINE vf exponential(vf x)
{
    const float magic = 12582912.0f; /* 1.5 · 2^23: what is added to it is rounded to whole numbers */
    x = where(x < -87.0f, (vf){0} - 87.0f, x);
    x = where(x > 88.0f, (vf){0} + 88.0f, x);
    vf shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (((vi)shifted - 0x4B400000) << 23));
}

/* cap · tanh(x / cap) */
INLINE vf capped(vf x, float cap) { return cap - 2.0f * cap / (exponential(x * (2.0f / cap)) + 1.0f); }

/* Abramowitz and Stegun, 7.1.26: absolute error 1.5e-7. */
INLINE vf error_function(vf x)
{
    vi is_negative = x < 0.0f;
    vf size = where(is_negative, -x, x), t = 1.0f / (1.0f + 0.3275911f * size);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf y = 1.0f - p * t * exponential(-size * size);
    return where(is_negative, -y, y);
}

INLINE vf activated(int activation, vf x)
{
    switch (activation) {
    case SWIGLU: return x / (1.0f + exponential(-x));
    case GELU_TANH: return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    case RELU2: return where(x > 0.0f, x * x, (vf){0});
    default: return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
    }
}

INLINE float from_half(uint16_t half)
{
#ifdef __FLT16_MAX__
    _Float16 x;
    memcpy(&x, &half, 2);
    return (float)x;
#else
    uint32_t size = (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &size, 4);
    x *= 0x1p112f; /* the two types' exponents differ by 112 */
    return half & 0x8000 ? -x : x;
#endif
}

/* --- products --------------------------------------------------------------------------------------------------- */

typedef struct {
    const float *base; /* what the products are added to, or NULL */
    float *out;
    int64_t base_stride, stride; /* from one token to the next */
} Output;

INLINE int64_t row_bytes(int kind, int64_t cols)
{
    return kind == F32 ? 4 * cols : kind == BF16 ? 2 * cols : kind == INT4 ? cols / 2 : cols;
}

#ifdef __AVX512F__ /* a nibble chooses one of 16 floats that are scaled already */
#define NIBBLE_TABLE ((vf){-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7})
#define NIBBLE(bits, table) ((vf)_mm512_permutexvar_ps((__m512i)(bits), (__m512)(table)))
#else
#define NIBBLE_TABLE ((vf){0} + 1.0f)
#define NIBBLE(bits, table) (__builtin_convertvector(((bits) & 15) - 8, vf) * (table))
#endif

/* out[t][row + i · gap] = weight · x[t], for ROWS rows before `end` and n tokens; `kind` and `n` are constants in every
   copy of this. */
INLINE void multiply_block(const int kind, const int n, const Matrix *m, int64_t row, int64_t gap, int64_t end,
                           const float *x, int64_t x_stride, Output to)
{
    const int64_t cols = m->cols, bytes = row_bytes(kind, cols), n_groups = cols / m->group;
    const int has_groups = kind == INT8_GROUPS || kind == INT4;
    const char *weight[ROWS];
    const uint16_t *scales[ROWS];
    vf total[ROWS][MOST_TOKENS];
    for (int i = 0; i < ROWS; i++) {
        int64_t r = smaller(row + i * gap, end - 1); /* behind the last row: that one again, and not stored */
        weight[i] = (const char *)m->weight + r * bytes;
        scales[i] = m->scales + r * n_groups;
        for (int t = 0; t < n; t++) total[i][t] = (vf){0};
    }
    for (int64_t k = 0, group = 0; k < cols; group++) {
        const int64_t stop = has_groups ? k + m->group : cols;
        vf unit[ROWS];
        if (has_groups)
            for (int i = 0; i < ROWS; i++)
                unit[i] = (kind == INT4 ? NIBBLE_TABLE : (vf){0} + 1.0f) * from_half(scales[i][group]);
        if (kind == INT4) {
            for (; k < stop; k += 32)
                for (int half = 0; half < 16; half += W)
                    for (int i = 0; i < ROWS; i++) {
                        vi8 packed;
                        memcpy(&packed, weight[i] + k / 2 + half, sizeof packed);
                        vi bits = wide_u8(packed);
                        vf low = NIBBLE(bits, unit[i]), high = NIBBLE(bits >> 4, unit[i]);
                        for (int t = 0; t < n; t++) {
                            total[i][t] += low * load(F32, x + t * x_stride, k + half, W);
                            total[i][t] += high * load(F32, x + t * x_stride, k + half + 16, W);
                        }
                    }
            continue;
        }
        for (; k + W <= stop; k += W) {
            vf inputs[MOST_TOKENS];
            for (int t = 0; t < n; t++) inputs[t] = load(F32, x + t * x_stride, k, W);
            for (int i = 0; i < ROWS; i++) {
                vf w = load(kind, weight[i], k, W);
                if (has_groups) w *= unit[i];
                for (int t = 0; t < n; t++) total[i][t] += w * inputs[t];
            }
        }
        if (k < stop) { /* only behind the last whole vector of a row: groups hold whole ones */
            for (int i = 0; i < ROWS; i++)
                for (int t = 0; t < n; t++)
                    total[i][t] += load(kind, weight[i], k, stop - k) * load(F32, x + t * x_stride, k, stop - k);
            k = stop;
        }
    }
    for (int t = 0; t < n; t++) {
        v4 y = sums(total[0][t], total[1][t], total[2][t], total[3][t]);
        for (int i = 0; i < ROWS && row + i * gap < end; i++) {
            const int64_t r = row + i * gap;
            float value = kind == INT8 ? y[i] * from_half(scales[i][0]) : y[i];
            if (m->bias) value += m->bias[r];
            if (to.base) value += to.base[t * to.base_stride + r];
            to.out[t * to.stride + r] = value;
        }
    }
}

typedef void (*Kernel)(const Matrix *, int64_t, int64_t, int64_t, const float *, int64_t, Output);
#define KERNEL(kind, n)                                                                                                \
    static void multiply_##kind##_##n(const Matrix *m, int64_t row, int64_t gap, int64_t end, const float *x,          \
                                      int64_t stride, Output to)                                                       \
    {                                                                                                                  \
        multiply_block(kind, n, m, row, gap, end, x, stride, to);                                                      \
    }
#define KERNELS(kind) KERNEL(kind, 1) KERNEL(kind, 2) KERNEL(kind, 3) KERNEL(kind, 4)
#define NAMES(kind) {multiply_##kind##_1, multiply_##kind##_2, multiply_##kind##_3, multiply_##kind##_4}
KERNELS(F32) KERNELS(BF16) KERNELS(INT8) KERNELS(INT8_GROUPS) KERNELS(INT4)
static const Kernel kernels[][MOST_TOKENS] = {NAMES(F32), NAMES(BF16), NAMES(INT8), NAMES(INT8_GROUPS), NAMES(INT4)};

typedef struct {
    int64_t first, end;
} Span;

/* A thread's rows. */
static Span share(int64_t rows, int thread, int threads)
{
    return (Span){rows * thread / threads, rows * (thread + 1) / threads};
}

/* Rows of weight · x for all n tokens: ROWS rows meet all of them while they are in the cache. The rows are far apart,
   one from each part of the span, so that each part is read from its start to its end: the processor fetches few long
   streams ahead, and hardly ever many short ones. */
static void multiply(const Matrix *m, Span rows, const float *x, int64_t x_stride, int64_t n, Output to)
{
    const int64_t gap = (rows.end - rows.first + ROWS - 1) / ROWS;
    for (int64_t row = rows.first; row < rows.first + gap; row++)
        for (int64_t t = 0; t < n; t += TOKENS) {
            const float *base = to.base ? to.base + t * to.base_stride : 0;
            kernels[m->kind][smaller(n - t, TOKENS) - 1](m, row, gap, rows.end, x + t * x_stride, x_stride,
                                                         (Output){base, to.out + t * to.stride, to.base_stride, to.stride});
        }
}

/* One row of a matrix: an embedding. */
static void read_row(const Matrix *m, int64_t row, float *out)
{
    const char *from = (const char *)m->weight + row * row_bytes(m->kind, m->cols);
    for (int64_t k = 0; k < m->cols; k++) {
        uint32_t bits = m->kind == BF16 ? (uint32_t)((const uint16_t *)from)[k] << 16 : 0;
        if (m->kind == F32) out[k] = ((const float *)from)[k];
        else if (m->kind == BF16) memcpy(out + k, &bits, 4);
        else {
            uint8_t pair = m->kind == INT4 ? from[k / 32 * 16 + k % 16] : 0;
            int value = m->kind == INT4 ? (k % 32 < 16 ? pair & 15 : pair >> 4) - 8 : ((const int8_t *)from)[k];
            out[k] = value * from_half(m->scales[row * (m->cols / m->group) + k / m->group]);
        }
    }
}

/* --- norms and positions ---------------------------------------------------------------------------------------- */

static void normalize(const Norm *norm, int is_layernorm, float eps, const float *x, float *out, int64_t n)
{
    vf total = {0}, squares = {0};
    float mean = 0.0f;
    if (is_layernorm) {
        for (int64_t i = 0; i < n; i += W) total += load(F32, x, i, smaller(W, n - i));
        mean = sum(total) / n;
    }
    for (int64_t i = 0; i < n; i++) out[i] = x[i] - mean;
    for (int64_t i = 0; i < n; i += W) {
        vf v = load(F32, out, i, smaller(W, n - i));
        squares += v * v;
    }
    float factor = 1.0f / sqrtf(sum(squares) / n + eps);
    for (int64_t i = 0; i < n; i++)
        out[i] = out[i] * factor * (norm->weight ? norm->weight[i] : 1.0f) + (norm->bias ? norm->bias[i] : 0.0f);
}

/* Queries or keys of one head: their norm, then RoPE. */
static void prepare_head(const Model *m, const Norm *norm, float *x, int64_t position)
{
    const int64_t half = m->rotated / 2;
    if (m->has_qk_norm) normalize(norm, 0, m->eps, x, x, m->head_dim);
    const float *cos = m->cos + position * half, *sin = m->sin + position * half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* --- the cache and attention -------------------------------------------------------------------------------------- */

/* A position's place, for key/value head 0: in head_dim numbers from the start of a layer's cache. */
INLINE int64_t entry_of(const Model *m, const Layer *l, const int32_t *blocks, int64_t position, int64_t *left)
{
    int64_t index = position, sinks = l->ring_sinks;
    if (l->ring && position >= sinks) index = sinks + (position - sinks) % (l->ring - sinks);
    *left = l->block_size - index % l->block_size;
    return (int64_t)blocks[index / l->block_size] * m->n_kv_heads * l->block_size + index % l->block_size;
}

static void write_entry(int kind, void *to, float *scales, int64_t entry, const float *x, int64_t n)
{
    if (kind == F32) {
        memcpy((float *)to + entry * n, x, 4 * n);
    } else if (kind == BF16) {
        uint16_t *out = (uint16_t *)to + entry * n;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            out[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
    } else {
        float largest = 1e-12f;
        for (int64_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
        const float scale = scales[entry] = largest / 127.0f;
        for (int64_t i = 0; i < n; i++) ((int8_t *)to)[entry * n + i] = (int8_t)rintf(x[i] / scale);
    }
}

/* The entries that a query at position p attends to, and their positions; how many there are. */
static int64_t visible_entries(const Model *m, const Layer *l, const int32_t *blocks, int64_t p, int32_t *entries,
                               int32_t *positions)
{
    int64_t n = 0;
    for (int64_t j = 0; j <= p;) {
        int64_t last = p, left; /* the last position of a run whose entries are neighbours */
        if (l->pattern == WINDOW) {
            if (j < l->sink_tokens) last = smaller(p, l->sink_tokens - 1);
            else if (j <= p - l->window) j = p - l->window + 1;
        } else if (l->pattern != FULL) {
            int is_near = l->pattern == STRIDED ? p - j < l->stride : p / l->stride == j / l->stride;
            int is_far = l->pattern == STRIDED ? (p - j) % l->stride == 0 : j % l->stride >= l->stride - l->summary;
            last = is_near || is_far ? j : j - 1;
        }
        if (l->ring && j < l->ring_sinks) last = smaller(last, l->ring_sinks - 1);
        int64_t entry = entry_of(m, l, blocks, j, &left), run = smaller(last - j + 1, left);
        for (int64_t i = 0; i < run; i++) {
            entries[n + i] = entry + i;
            positions[n + i] = j + i;
        }
        n += run;
        j += run ? run : 1;
    }
    return n;
}

/* scores[i] = key of entry i · q, four at a time. */
INLINE void score_keys(const int kind, const Layer *l, const int32_t *entries, int64_t n, int64_t shift, const float *q,
                       int64_t head_dim, float *scores)
{
    const int64_t size = kind == F32 ? 4 : kind == BF16 ? 2 : 1;
    for (int64_t i = 0; i < n; i += 4) {
        const char *key[4];
        vf total[4] = {{0}, {0}, {0}, {0}};
        for (int a = 0; a < 4; a++)
            key[a] = (const char *)l->keys + (entries[smaller(i + a, n - 1)] + shift) * head_dim * size;
        int64_t d = 0;
        for (; d + W <= head_dim; d += W)
            for (int a = 0; a < 4; a++) total[a] += load(kind, key[a], d, W) * load(F32, q, d, W);
        if (d < head_dim)
            for (int a = 0; a < 4; a++) total[a] += load(kind, key[a], d, head_dim - d) * load(F32, q, d, head_dim - d);
        v4 found = sums(total[0], total[1], total[2], total[3]);
        memcpy(scores + i, &found, sizeof found);
    }
    if (kind == INT8)
        for (int64_t i = 0; i < n; i++) scores[i] *= l->key_scales[entries[i] + shift];
}

/* out[d … d + vectors · W) = the weighted sum of the entries' values; the last vector has `lanes` numbers. */
INLINE void sum_values(const int kind, const int vectors, const Layer *l, const int32_t *entries, int64_t n,
                       int64_t shift, const float *weights, int64_t head_dim, int64_t d, int64_t lanes, float *out)
{
    const int64_t size = kind == F32 ? 4 : kind == BF16 ? 2 : 1;
    vf total[4] = {{0}, {0}, {0}, {0}};
    for (int64_t i = 0; i < n; i++) {
        const char *value = (const char *)l->values + ((entries[i] + shift) * head_dim + d) * size;
        for (int a = 0; a < vectors; a++) total[a] += weights[i] * load(kind, value, a * W, lanes);
    }
    for (int a = 0; a < vectors; a++) store(out + d + a * W, total[a], lanes);
}

/* One query head over its entries. scores: n + W floats. */
INLINE void attend(const int kind, const Model *m, const Layer *l, const int32_t *entries, const int32_t *positions,
                   int64_t n, int64_t shift, const float *q, float slope, float *scores, float *out)
{
    const int64_t head_dim = m->head_dim, p = positions[n - 1];
    score_keys(kind, l, entries, n, shift, q, head_dim, scores);
    for (int64_t i = 0; i < n; i += W) {
        vf s = load(F32, scores, i, W) * m->attention_scale;
        store(scores + i, m->attention_softcap > 0 ? capped(s, m->attention_softcap) : s, W);
    }
    for (int64_t i = 0; slope != 0.0f && i < n; i++) scores[i] += slope * (positions[i] - p);
    for (int i = 0; i < W; i++) scores[n + i] = -INFINITY;
    vf most = (vf){0} - INFINITY, total = {0};
    for (int64_t i = 0; i < n; i += W) {
        vf s = load(F32, scores, i, W);
        most = where(s > most, s, most);
    }
    float largest = most[0];
    for (int a = 1; a < W; a++) largest = most[a] > largest ? most[a] : largest;
    for (int64_t i = 0; i < n; i += W) {
        vf w = exponential(load(F32, scores, i, W) - largest);
        store(scores + i, w, W);
        total += w;
    }
    const float factor = 1.0f / sum(total);
    for (int64_t i = 0; i < n; i++) scores[i] *= kind == INT8 ? factor * l->value_scales[entries[i] + shift] : factor;
    int64_t d = 0;
    for (; d + 4 * W <= head_dim; d += 4 * W) sum_values(kind, 4, l, entries, n, shift, scores, head_dim, d, W, out);
    for (; d + W <= head_dim; d += W) sum_values(kind, 1, l, entries, n, shift, scores, head_dim, d, W, out);
    if (d < head_dim) sum_values(kind, 1, l, entries, n, shift, scores, head_dim, d, head_dim - d, out);
}

static void attend_head(const Model *m, const Layer *l, const int32_t *entries, const int32_t *positions, int64_t n,
                        int64_t shift, const float *q, float slope, float *scores, float *out)
{
    if (l->cache_kind == F32) attend(F32, m, l, entries, positions, n, shift, q, slope, scores, out);
    else if (l->cache_kind == BF16) attend(BF16, m, l, entries, positions, n, shift, q, slope, scores, out);
    else attend(INT8, m, l, entries, positions, n, shift, q, slope, scores, out);
}

/* --- the step ----------------------------------------------------------------------------------------------------- */

INLINE int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }

/* What all threads know; each has its own `thread`, `own` and scores. Strides are from one token to the next. */
typedef struct {
    const Model *m;
    int thread, threads;
    int64_t d, q, kv, ff; /* strides */
    float *x, *normed, *own, *queries, *keys, *values, *attended, *gate, *up, *scores;
    int32_t *entries, *positions;
} Work;

/* Where a thread's buffers lie in memory of `scratch_floats` floats. */
static Work layout(const Model *m, float *memory, int64_t n, int thread, int threads)
{
    Work w = {m, thread, threads, padded(m->d_model), padded(m->n_heads * m->head_dim),
              padded(m->n_kv_heads * m->head_dim), padded(m->d_ff)};
    int64_t reach = padded(m->reach);
    w.x = memory;
    w.normed = w.x + n * w.d;
    w.queries = w.normed + n * w.d;
    w.keys = w.queries + n * w.q;
    w.values = w.keys + n * w.kv;
    w.attended = w.values + n * w.kv;
    w.gate = w.attended + n * w.q;
    w.up = w.gate + n * w.ff;
    w.own = w.up + n * w.ff + thread * (smaller(n, 8) * w.d + 3 * reach);
    w.scores = w.own + smaller(n, 8) * w.d;
    w.entries = (int32_t *)(w.scores + reach);
    w.positions = w.entries + reach;
    return w;
}

int64_t scratch_floats(const Model *m, int64_t n, int threads) { return layout(m, 0, n, threads, threads).own - (float *)0; }

/* A sub-layer's input: few tokens are normalized by every thread for itself, which is cheaper than a barrier. */
static const float *normed(const Work *w, const Norm *norm, const int32_t *which, int64_t n)
{
    const Model *m = w->m;
    if (!norm) return w->x;
    const int is_shared = n > 8 && w->threads > 1;
    float *out = n > 8 ? w->normed : w->own;
    for (int64_t t = is_shared ? w->thread : 0; t < n; t += is_shared ? w->threads : 1)
        normalize(norm, m->is_layernorm, m->eps, w->x + (which ? which[t] : t) * w->d, out + t * w->d, m->d_model);
    if (is_shared) {
#pragma omp barrier
    }
    return out;
}

static void embed(const Work *w, const int32_t *ids, const int32_t *positions, int64_t n)
{
    const Model *m = w->m;
    for (int64_t t = w->thread; t < n; t += w->threads) {
        float *x = w->x + t * w->d;
        const float *added = m->positions ? m->positions + (int64_t)positions[t] * m->d_model : 0;
        read_row(&m->embedding, ids[t], x);
        for (int64_t i = 0; i < m->d_model; i++) x[i] = x[i] * m->embedding_scale + (added ? added[i] : 0.0f);
    }
}

/* Attention of one layer from its queries, keys and values. */
static void attention(const Work *w, const Layer *l, const int32_t *table, const int32_t *slots,
                      const int32_t *positions, int64_t n, int shares_slots)
{
    const Model *m = w->m;
    const int64_t head_dim = m->head_dim, group = m->n_heads / m->n_kv_heads;
    int64_t parts = 1, left; /* a group of query heads is one thread's, unless there are too few groups */
    while (n * m->n_kv_heads * parts < w->threads && parts < group) parts++;
    while (group % parts) parts++;
    for (int64_t i = w->thread; i < n * m->n_kv_heads; i += w->threads) {
        int64_t t = i / m->n_kv_heads, head = i % m->n_kv_heads;
        float *key = w->keys + t * w->kv + head * head_dim;
        int64_t entry = entry_of(m, l, table + (int64_t)slots[t] * m->table_width, positions[t], &left);
        prepare_head(m, &l->k_norm, key, positions[t]);
        entry += head * l->block_size;
        write_entry(l->cache_kind, l->keys, l->key_scales, entry, key, head_dim);
        write_entry(l->cache_kind, l->values, l->value_scales, entry, w->values + t * w->kv + head * head_dim, head_dim);
    }
    if (shares_slots || parts > 1) { /* another thread's entry is attended to */
#pragma omp barrier
    }
    for (int64_t i = w->thread; i < n * m->n_kv_heads * parts; i += w->threads) {
        int64_t t = i / (m->n_kv_heads * parts), head = i / parts % m->n_kv_heads, part = i % parts;
        int64_t first = head * group + part * (group / parts);
        int64_t seen = visible_entries(m, l, table + (int64_t)slots[t] * m->table_width, positions[t], w->entries, w->positions);
        for (int64_t h = first; h < first + group / parts; h++) {
            float *q = w->queries + t * w->q + h * head_dim;
            prepare_head(m, &l->q_norm, q, positions[t]);
            attend_head(m, l, w->entries, w->positions, seen, head * l->block_size, q, m->slopes ? m->slopes[h] : 0.0f,
                        w->scores, w->attended + t * w->q + h * head_dim);
        }
    }
}

/* A thread's part of the feed-forward layer's inside. */
static void widen(const Work *w, const Layer *l, const float *x, int64_t n)
{
    const Model *m = w->m;
    const Span rows = share(m->d_ff, w->thread, w->threads);
    const int is_gated = l->gate.weight != 0;
    if (is_gated) multiply(&l->gate, rows, x, w->d, n, (Output){0, w->gate, 0, w->ff});
    multiply(&l->up, rows, x, w->d, n, (Output){0, w->up, 0, w->ff});
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = rows.first; i < rows.end; i += W) {
            int64_t lanes = smaller(W, rows.end - i);
            vf up = load(F32, w->up + t * w->ff, i, lanes);
            if (is_gated) up *= activated(m->activation, load(F32, w->gate + t * w->ff, i, lanes));
            else up = activated(m->activation, up);
            store(w->up + t * w->ff + i, up, lanes);
        }
}

static void predict(const Work *w, const Norm *norm, const int32_t *wanted, int64_t n, float *logits)
{
    const Model *m = w->m;
    const Span rows = share(m->vocab_size, w->thread, w->threads);
    multiply(&m->head, rows, normed(w, norm, wanted, n), w->d, n, (Output){0, logits, 0, m->vocab_size});
    if (m->logit_softcap > 0)
        for (int64_t t = 0; t < n; t++)
            for (int64_t i = rows.first; i < rows.end; i += W) {
                int64_t lanes = smaller(W, rows.end - i);
                float *at = logits + t * m->vocab_size + i;
                store(at, capped(load(F32, at, 0, lanes), m->logit_softcap), lanes);
            }
}

/* What is wrong with a call: 1 an id, 2 a slot, 3 a position, 4 an entry of the table, 5 `wanted`; 0: nothing. */
static int fault(const Model *m, const int32_t *ids, const int32_t *slots, const int32_t *positions, int64_t n,
                 const int32_t *wanted, int64_t n_wanted, const int32_t *table, int64_t n_slots)
{
    for (int64_t t = 0; t < n; t++) {
        if (ids[t] < 0 || ids[t] >= m->vocab_size) return 1;
        if (slots[t] < 0 || slots[t] >= n_slots) return 2;
        if (positions[t] < 0 || positions[t] >= m->reach) return 3;
        for (int32_t i = 0; i < m->n_layers; i++) {
            const Layer *l = m->layers + i;
            if (i && l->block_size == l[-1].block_size && l->n_blocks == l[-1].n_blocks && l->ring == l[-1].ring) continue;
            int64_t last = smaller(positions[t], l->ring ? l->ring - 1 : positions[t]) / l->block_size;
            if (last >= m->table_width) return 3;
            for (int64_t b = 0; b <= last; b++) {
                int32_t block = table[slots[t] * (int64_t)m->table_width + b];
                if (block < 0 || block >= l->n_blocks) return 4;
            }
        }
    }
    if (n_wanted > n) return 5;
    for (int64_t i = 0; i < n_wanted; i++)
        if (wanted[i] < 0 || wanted[i] >= n) return 5;
    return 0;
}

/* ids, slots, positions: (n,); wanted: (n_wanted,), indexes of tokens; table: (n_slots, table_width);
   logits: (n_wanted, vocab_size). The first n_layers layers are computed. */
int step(const Model *m, const int32_t *ids, const int32_t *slots, const int32_t *positions, int64_t n,
         const int32_t *wanted, int64_t n_wanted, const int32_t *table, int64_t n_slots, int n_layers, float *logits,
         float *memory, int threads)
{
    const int found = fault(m, ids, slots, positions, n, wanted, n_wanted, table, n_slots);
    if (found) return found;
    int shares_slots = 0;
    for (int64_t t = 1; t < n && !shares_slots; t++)
        for (int64_t u = 0; u < t; u++) shares_slots |= slots[t] == slots[u];
#pragma omp parallel num_threads(threads)
    {
        int thread = 0, team = 1;
#ifdef _OPENMP
        extern int omp_get_thread_num(void), omp_get_num_threads(void);
        thread = omp_get_thread_num(), team = omp_get_num_threads();
#endif
        const Work work = layout(m, memory, n, thread, team), *w = &work;
        const Norm *after = 0; /* post-norm: what makes the last sum the next input */
        embed(w, ids, positions, n);
#pragma omp barrier
        for (int i = 0; i < n_layers; i++) {
            const Layer *l = m->layers + i;
            const float *x = normed(w, m->is_post_norm ? after : &l->attention_norm, 0, n);
            multiply(&l->q, share(l->q.rows, thread, team), x, w->d, n, (Output){0, w->queries, 0, w->q});
            multiply(&l->k, share(l->k.rows, thread, team), x, w->d, n, (Output){0, w->keys, 0, w->kv});
            multiply(&l->v, share(l->v.rows, thread, team), x, w->d, n, (Output){0, w->values, 0, w->kv});
#pragma omp barrier
            attention(w, l, table, slots, positions, n, shares_slots);
#pragma omp barrier
            multiply(&l->o, share(m->d_model, thread, team), w->attended, w->q, n,
                     (Output){m->is_post_norm ? x : w->x, w->x, w->d, w->d});
#pragma omp barrier
            x = normed(w, m->is_post_norm ? &l->attention_norm : &l->feedforward_norm, 0, n);
            widen(w, l, x, n);
#pragma omp barrier
            multiply(&l->down, share(m->d_model, thread, team), w->up, w->ff, n,
                     (Output){m->is_post_norm ? x : w->x, w->x, w->d, w->d});
#pragma omp barrier
            after = &l->feedforward_norm;
        }
        predict(w, m->is_post_norm ? after : &m->norm, wanted, n_wanted, logits);
    }
    return 0;
}
