/* One decoding step of a dense Transformer on CPUs: N tokens in, their keys and values into the cache, logits out.

   A step reads every weight once, so memory's bandwidth is its limit, and the time between two operations its
   overhead. Therefore: products keep a few rows and tokens in registers and widen weights (float32, bfloat16, 8 or 4
   bits) on their way to them; activations and sums are float32, but that bfloat16 is multiplied by bfloat16 where the
   processor can; one parallel region spans the whole step, with a barrier only where a thread needs what others
   computed. A token's sums are added in one order, however many are computed with it. `native.py` compiles and fills in the structs below, which
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
#define MOST_TOKENS 6
#define TOKENS (W == 8 ? 3 : MOST_TOKENS) /* ROWS · TOKENS sums stand in registers at once */
#define PANEL 3 /* vectors of tokens */
#define UNROLL _Pragma("GCC unroll 8")
#define FEW 8 /* tokens */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef int8_t vi8 __attribute__((vector_size(W)));
typedef float v4 __attribute__((vector_size(16)));

extern int omp_get_thread_num(void), omp_get_num_threads(void); /* Apple's clang has no omp.h */

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

typedef struct {
    const int32_t *ids, *slots, *positions; /* (n,); a slot's positions ascend */
    const int32_t *wanted;                  /* (n_wanted,): the tokens whose logits are wanted */
    const int32_t *table;                   /* (n_slots, table_width): the blocks of a slot */
    float *logits;                          /* (n_wanted, vocab_size) */
    float *memory;                          /* as many floats as `scratch_floats` says */
    int32_t n, n_wanted, n_slots, n_layers, threads;
} Call;

typedef struct {
    const float *settings;  /* (n_texts, 4): temperature (0: the most probable token), top-k (0: all), top-p, min-p */
    const double *uniforms; /* (n_texts, length), of [0, 1) */
    const int32_t *most;    /* (n_texts,): guesses of each text, 1 to `length` */
    int32_t *tokens;        /* (n_texts, length) */
    float *laws;            /* (n_texts, length, vocab_size): what each is drawn from; NULL: all temperatures are 0 */
    int32_t length;
} Guesses;

/* --- vectors ---------------------------------------------------------------------------------------------------- */

/* Of each four numbers of two vectors a and b: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3. */
#ifdef __AVX512F__
#define LOWER(a, b) ((vf)_mm512_unpacklo_ps((__m512)(a), (__m512)(b)))
#define UPPER(a, b) ((vf)_mm512_unpackhi_ps((__m512)(a), (__m512)(b)))
#define LOWER_PAIRS(a, b) ((vf)_mm512_unpacklo_pd((__m512d)(a), (__m512d)(b)))
#define UPPER_PAIRS(a, b) ((vf)_mm512_unpackhi_pd((__m512d)(a), (__m512d)(b)))
#define KEEP(x) __asm__("" : "+v"(x)) /* in a register: it is used many times */
#else
#if W == 8
#define KEEP(x) __asm__("" : "+x"(x))
#define LOWER(a, b) ((vf)_mm256_unpacklo_ps((__m256)(a), (__m256)(b)))
#define UPPER(a, b) ((vf)_mm256_unpackhi_ps((__m256)(a), (__m256)(b)))
#define LOWER_PAIRS(a, b) ((vf)_mm256_unpacklo_pd((__m256d)(a), (__m256d)(b)))
#define UPPER_PAIRS(a, b) ((vf)_mm256_unpackhi_pd((__m256d)(a), (__m256d)(b)))
#else
#define KEEP(x)
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define LOWER(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define UPPER(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOWER_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define UPPER_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#endif
#endif

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Floats of a row of n, so that rows do not meet in the same lines of the cache. */
INLINE int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }

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

/* The sums of four vectors: four numbers at a time first. */
INLINE v4 sums(vf a, vf b, vf c, vf d)
{
    vf ab = LOWER(a, b) + UPPER(a, b), cd = LOWER(c, d) + UPPER(c, d);
    return folded(LOWER_PAIRS(ab, cd) + UPPER_PAIRS(ab, cd));
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

/* 4-bit weights k … k + W of a row, k in its run's lower (shift 0) or upper half (4). */
INLINE vf load_int4(const char *row, int64_t k, int shift, vf table)
{
    vi8 packed;
    memcpy(&packed, row + k / 32 * 16 + k % 16, sizeof packed);
    return NIBBLE(wide_u8(packed) >> shift, table);
}

/* y[t][i] = weight[i] · x[t] without a row's scale, for ROWS rows and n tokens; `kind` and `n` are constants in every
   copy of this. Lane j adds up columns j, j + W, … in every kind, so that `unpack` before it changes no bit. */
INLINE void multiply_block(const int kind, const int n, const Matrix *m, const char *const *weight,
                           const uint16_t *const *scales, const float *x, int64_t x_stride, v4 *y)
{
    const int64_t cols = m->cols;
    const int has_groups = kind == INT8_GROUPS || kind == INT4;
    vf total[ROWS][MOST_TOKENS], inputs[MOST_TOKENS];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int t = 0; t < n; t++) total[i][t] = (vf){0};
    for (int64_t k = 0, group = 0; k < cols; group++) {
        const int64_t stop = has_groups ? k + m->group : cols;
        vf unit[ROWS];
        if (has_groups)
            UNROLL for (int i = 0; i < ROWS; i++)
                unit[i] = (kind == INT4 ? NIBBLE_TABLE : (vf){0} + 1.0f) * from_half(scales[i][group]);
        if (kind == INT4) {
            for (; k < stop; k += 32)
                UNROLL for (int at = 0; at < 32; at += W)
                    UNROLL for (int i = 0; i < ROWS; i++) {
                        vf w = load_int4(weight[i], k + at, at / 16 * 4, unit[i]);
                        UNROLL for (int t = 0; t < n; t++) total[i][t] += w * load(F32, x + t * x_stride, k + at, W);
                    }
            continue;
        }
        for (; k + W <= stop; k += W) {
            UNROLL for (int t = 0; t < n; t++) {
                inputs[t] = load(F32, x + t * x_stride, k, W);
                KEEP(inputs[t]);
            }
            UNROLL for (int i = 0; i < ROWS; i++) {
                vf w = load(kind, weight[i], k, W);
                if (has_groups) w *= unit[i];
                UNROLL for (int t = 0; t < n; t++) total[i][t] += w * inputs[t];
            }
        }
        if (k < stop) { /* only behind the last whole vector of a row: groups hold whole ones */
            UNROLL for (int i = 0; i < ROWS; i++)
                UNROLL for (int t = 0; t < n; t++)
                    total[i][t] += load(kind, weight[i], k, stop - k) * load(F32, x + t * x_stride, k, stop - k);
            k = stop;
        }
    }
    UNROLL for (int t = 0; t < n; t++) y[t] = sums(total[0][t], total[1][t], total[2][t], total[3][t]);
}

#ifdef __AVX512BF16__
#define LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
/* The same with both sides in bfloat16: a lane adds up pairs of columns. */
INLINE __m512bh load_pairs(const void *from, int64_t i, int64_t n)
{
    __m512i x = _mm512_setzero_si512();
    memcpy(&x, (const uint16_t *)from + i, n == 2 * W ? 4 * W : 2 * n);
    return (__m512bh)x;
}

INLINE void multiply_pairs(const int n, const Matrix *m, const char *const *weight, const void *x, int64_t x_stride,
                           v4 *y)
{
    __m512 total[ROWS][MOST_TOKENS];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int t = 0; t < n; t++) total[i][t] = _mm512_setzero_ps();
    const int64_t whole = m->cols / (2 * W) * (2 * W);
    for (int64_t k = 0; k < whole; k += 2 * W) {
        __m512bh inputs[MOST_TOKENS];
        UNROLL for (int t = 0; t < n; t++) {
            inputs[t] = load_pairs(x, t * x_stride + k, 2 * W);
            KEEP(inputs[t]);
        }
        UNROLL for (int i = 0; i < ROWS; i++) {
            const __m512bh w = load_pairs(weight[i], k, 2 * W);
            UNROLL for (int t = 0; t < n; t++) total[i][t] = _mm512_dpbf16_ps(total[i][t], w, inputs[t]);
        }
    }
    if (whole < m->cols)
        UNROLL for (int i = 0; i < ROWS; i++) {
            const __m512bh w = load_pairs(weight[i], whole, m->cols - whole);
            UNROLL for (int t = 0; t < n; t++)
                total[i][t] = _mm512_dpbf16_ps(total[i][t], w, load_pairs(x, t * x_stride + whole, 2 * W));
        }
    UNROLL for (int t = 0; t < n; t++)
        y[t] = sums((vf)total[0][t], (vf)total[1][t], (vf)total[2][t], (vf)total[3][t]);
}
#endif

typedef void (*Kernel)(const Matrix *, const char *const *, const uint16_t *const *, const void *, int64_t, v4 *);
#define KERNEL(kind, n)                                                                                                \
    static void multiply_##kind##_##n(const Matrix *m, const char *const *weight, const uint16_t *const *scales,       \
                                      const void *x, int64_t stride, v4 *y)                                            \
    {                                                                                                                  \
        MULTIPLY(kind, n);                                                                                             \
    }
#define MULTIPLY(kind, n) multiply_block(kind, n, m, weight, scales, x, stride, y)
#define KERNELS(kind) KERNEL(kind, 1) KERNEL(kind, 2) KERNEL(kind, 3) KERNEL(kind, 4) KERNEL(kind, 5) KERNEL(kind, 6)
#define NAMES(kind)                                                                                                    \
    {multiply_##kind##_1, multiply_##kind##_2, multiply_##kind##_3,                                                    \
     multiply_##kind##_4, multiply_##kind##_5, multiply_##kind##_6}
KERNELS(F32) KERNELS(INT8) KERNELS(INT8_GROUPS) KERNELS(INT4)
#ifdef __AVX512BF16__
#undef MULTIPLY
#define MULTIPLY(kind, n) multiply_pairs(n, m, weight, x, stride, y)
#endif
KERNELS(BF16)
static const Kernel kernels[][MOST_TOKENS] = {NAMES(F32), NAMES(BF16), NAMES(INT8), NAMES(INT8_GROUPS), NAMES(INT4)};

/* How many of the vectors of tokens that are left are multiplied at once: 2 or 3. */
INLINE int64_t panel_of(int64_t left) { return left == 4 ? 2 : smaller(left, PANEL); }

/* Tokens (n, cols) as `multiply_panel` reads them: of each lane, of each of its columns, all tokens from `first` on. */
static void turn(const float *x, int64_t x_stride, int64_t cols, int64_t first, int64_t n, int64_t size, float *out)
{
    const int64_t steps = (cols + W - 1) / W;
    for (int64_t t = 0; t < size; t += 4)
        for (int64_t step = 0; step < steps; step++) {
            vf in[4], part[4];
            UNROLL for (int a = 0; a < 4; a++) /* behind the last token: that one again */
                in[a] = load(F32, x + smaller(first + t + a, n - 1) * x_stride, step * W, smaller(W, cols - step * W));
            const vf lower[2] = {LOWER(in[0], in[1]), LOWER(in[2], in[3])};
            const vf upper[2] = {UPPER(in[0], in[1]), UPPER(in[2], in[3])};
            part[0] = LOWER_PAIRS(lower[0], lower[1]), part[1] = UPPER_PAIRS(lower[0], lower[1]);
            part[2] = LOWER_PAIRS(upper[0], upper[1]), part[3] = UPPER_PAIRS(upper[0], upper[1]);
            UNROLL for (int a = 0; a < W; a++)
                memcpy(out + (a * steps + step) * size + t, (const float *)&part[a % 4] + a / 4 * 4, sizeof(v4));
        }
}

/* `multiply_block` of float32 for vectors · W tokens, a token in each lane: no sum of a vector is needed, and the sums
   are those of the other form to the bit. */
INLINE void multiply_panel(const int vectors, const Matrix *m, const char *const *weight, const float *x,
                           vf y[ROWS][PANEL])
{
    const int64_t cols = m->cols, steps = (cols + W - 1) / W, n = vectors * W;
    vf lanes[4][ROWS][PANEL];
    for (int first = 0; first < W; first += 4) {
        for (int a = 0; a < 4; a++) {
            const float *inputs = x + (first + a) * steps * n;
            vf total[ROWS][PANEL];
            UNROLL for (int i = 0; i < ROWS; i++)
                UNROLL for (int v = 0; v < vectors; v++) total[i][v] = (vf){0};
            for (int64_t k = first + a; k < cols; k += W, inputs += n) {
                vf in[PANEL];
                UNROLL for (int v = 0; v < vectors; v++) {
                    in[v] = load(F32, inputs, v * W, W);
                    KEEP(in[v]);
                }
                UNROLL for (int i = 0; i < ROWS; i++)
                    UNROLL for (int v = 0; v < vectors; v++)
                        total[i][v] += in[v] * ((const float *)weight[i])[k];
            }
            UNROLL for (int i = 0; i < ROWS; i++)
                UNROLL for (int v = 0; v < vectors; v++) lanes[a][i][v] = total[i][v];
        }
        UNROLL for (int i = 0; i < ROWS; i++)
            UNROLL for (int v = 0; v < vectors; v++) {
                vf part = (lanes[0][i][v] + lanes[2][i][v]) + (lanes[1][i][v] + lanes[3][i][v]);
                y[i][v] = first ? y[i][v] + part : part;
            }
    }
}

/* A row as floats; of INT8 without its scale. */
INLINE void unpack_as(const int kind, const Matrix *m, int64_t row, float *out)
{
    const char *from = (const char *)m->weight + row * row_bytes(kind, m->cols);
    const uint16_t *scales = m->scales + row * (m->cols / m->group);
    for (int64_t k = 0, group = 0; k < m->cols; group++) {
        const int64_t stop = k + m->group;
        const vf unit = (kind == INT4 ? NIBBLE_TABLE : (vf){0} + 1.0f)
                        * (kind == INT4 || kind == INT8_GROUPS ? from_half(scales[group]) : 1.0f);
        for (; k + W <= stop; k += W)
            store(out + k, kind == INT4 ? load_int4(from, k, k % 32 / 16 * 4, unit) : load(kind, from, k, W) * unit, W);
        if (k < stop) store(out + k, load(kind, from, k, stop - k), stop - k);
        k = stop;
    }
}

static void unpack(const Matrix *m, int64_t row, float *out)
{
    switch (m->kind) {
    case F32: unpack_as(F32, m, row, out); break;
    case BF16: unpack_as(BF16, m, row, out); break;
    case INT8: unpack_as(INT8, m, row, out); break;
    case INT8_GROUPS: unpack_as(INT8_GROUPS, m, row, out); break;
    default: unpack_as(INT4, m, row, out);
    }
}

typedef struct {
    int64_t first, end;
} Span;

/* Rows of weight · x for all n tokens: ROWS rows meet all of them while they are in the cache; narrow weights become
   floats once for many tokens. The rows are far apart, one from each part of the span, so that each part is read from
   its start to its end: the processor fetches few long streams ahead, and hardly ever many short ones. `memory` is the
   thread's own. */
static void multiply(const Matrix *m, Span rows, const float *x, int64_t x_stride, int64_t n, Output to, float *memory)
{
    const char *inputs = (const char *)x;
    const int64_t gap = (rows.end - rows.first + ROWS - 1) / ROWS;
    const int64_t passes = (n + TOKENS - 1) / TOKENS, most = (n + passes - 1) / passes;
    int64_t tile = 0, size = 4; /* floats of an unpacked row; bytes of an input */
    int kind = m->kind;
#ifdef __AVX512BF16__
    if (kind == BF16) {
        const int64_t stride = (m->cols + 63) / 32 * 32;
        for (int64_t t = 0; t < n; t++)
            for (int64_t k = 0; k < stride; k += W) {
                vf part = {0};
                if (k < m->cols) part = load(F32, x + t * x_stride, k, W);
                if (k + W > m->cols) part = where(LANES < (int32_t)(m->cols - k), part, (vf){0});
                const __m256bh rounded = _mm512_cvtneps_pbh((__m512)part);
                memcpy((uint16_t *)memory + t * stride + k, &rounded, sizeof rounded);
            }
        inputs = (const char *)memory, x_stride = stride, size = 2;
    }
#endif
    if (kind != F32 && size == 4 && n > 2 * TOKENS) kind = F32, tile = padded(m->cols);
    /* Many tokens stand in lanes; a vector that is less than three quarters full is worse than none. */
    const int64_t full = (n + W / 4) / W, vectors = kind == F32 && full > 1 ? full : 0;
    const int64_t length = (m->cols + W - 1) / W * W;
    float *panels = memory + ROWS * padded(m->cols);
    for (int64_t v = 0, count; v < vectors; v += count) {
        count = panel_of(vectors - v);
        turn(x, x_stride, m->cols, v * W, n, count * W, panels + v * W * length);
    }
    for (int64_t row = rows.first; row < rows.first + gap; row++) {
        const int64_t n_rows = smaller(ROWS, (rows.end - row + gap - 1) / gap);
        const char *weight[ROWS];
        const uint16_t *scales[ROWS];
        v4 scale = {1, 1, 1, 1}, bias = {0};
        int64_t at[ROWS];
        for (int i = 0; i < ROWS; i++) {
            at[i] = smaller(row + i * gap, rows.end - 1); /* behind the last row: that one again */
            weight[i] = (const char *)m->weight + at[i] * row_bytes(m->kind, m->cols);
            scales[i] = m->scales + at[i] * (m->cols / m->group);
            if (tile) {
                weight[i] = (const char *)(memory + i * tile);
                unpack(m, at[i], memory + i * tile);
            }
            if (m->kind == INT8) scale[i] = from_half(scales[i][0]);
            if (m->bias) bias[i] = m->bias[at[i]];
        }
        for (int64_t v = 0, count; v < vectors; v += count) {
            vf y[ROWS][PANEL];
            count = panel_of(vectors - v);
            if (count == 2) multiply_panel(2, m, weight, panels + v * W * length, y);
            else multiply_panel(3, m, weight, panels + v * W * length, y);
            for (int64_t t = v * W; t < smaller(n, (v + count) * W); t++)
                for (int i = 0; i < n_rows; i++)
                    to.out[t * to.stride + at[i]] = y[i][t / W - v][t % W] * scale[i] + bias[i]
                                                    + (to.base ? to.base[t * to.base_stride + at[i]] : 0.0f);
        }
        for (int64_t t = vectors * W; t < n; t += most) {
            const int64_t count = smaller(n - t, most);
            v4 y[MOST_TOKENS];
            kernels[kind][count - 1](m, weight, scales, inputs + t * x_stride * size, x_stride, y);
            for (int64_t u = 0; u < count; u++) {
                const float *base = to.base ? to.base + (t + u) * to.base_stride : 0;
                float *out = to.out + (t + u) * to.stride;
                v4 found = y[u] * scale + bias;
                for (int i = 0; i < n_rows; i++) out[at[i]] = found[i] + (base ? base[at[i]] : 0.0f);
            }
        }
    }
}

/* One row of a matrix: an embedding. */
static void read_row(const Matrix *m, int64_t row, float *out)
{
    unpack(m, row, out);
    for (int64_t k = 0; m->kind == INT8 && k < m->cols; k++) out[k] *= from_half(m->scales[row]);
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

/* --- threads ----------------------------------------------------------------------------------------------------- */

/* A call and a thread's part in it; `own` and what follows it is the thread's alone. */
typedef struct {
    const Model *m;
    const Call *c;
    int thread, threads;
    int64_t d, q, kv, ff; /* strides from one token to the next */
    float *x, *normed, *queries, *keys, *values, *attended, *gate, *up, *own, *scores, *products;
    int32_t *entries, *positions;
} Work;

static Work layout(const Model *m, const Call *c, int thread, int threads)
{
    Work w = {.m = m, .c = c, .thread = thread, .threads = threads};
    const int64_t reach = padded(m->reach), n = c->n, few = smaller(n, FEW);
    w.d = padded(m->d_model), w.ff = padded(m->d_ff);
    w.q = padded(m->n_heads * m->head_dim), w.kv = padded(m->n_kv_heads * m->head_dim);
    w.x = c->memory;
    w.normed = w.x + n * w.d;
    w.queries = w.normed + n * w.d;
    w.keys = w.queries + n * w.q;
    w.values = w.keys + n * w.kv;
    w.attended = w.values + n * w.kv;
    w.gate = w.attended + n * w.q;
    w.up = w.gate + n * w.ff;
    const int64_t products = (n + ROWS + W) * (w.d + w.q + w.ff);
    w.own = w.up + n * w.ff + thread * (few * w.d + products + 3 * reach);
    w.products = w.own + few * w.d;
    w.scores = w.products + products;
    w.entries = (int32_t *)(w.scores + reach);
    w.positions = w.entries + reach;
    return w;
}

int64_t scratch_floats(const Model *m, const Call *c)
{
    return layout(m, c, c->threads, c->threads).own - c->memory;
}

/* A thread's share of a matrix's rows. */
static Span share(const Work *w, int64_t rows)
{
    return (Span){rows * w->thread / w->threads, rows * (w->thread + 1) / w->threads};
}

/* --- the cache and attention -------------------------------------------------------------------------------------- */

/* A position's place in a layer's cache for key/value head 0, counted in entries; and how many follow in its block. */
INLINE int64_t entry_of(const Work *w, const Layer *l, int64_t t, int64_t position, int64_t *left)
{
    int64_t index = position, sinks = l->ring_sinks;
    if (l->ring && position >= sinks) index = sinks + (position - sinks) % (l->ring - sinks);
    const int64_t block = index / l->block_size, offset = index % l->block_size;
    *left = l->block_size - offset;
    return w->c->table[(int64_t)w->c->slots[t] * w->m->table_width + block] * (int64_t)w->m->n_kv_heads * l->block_size
           + offset;
}

static void write_entry(int kind, void *to, float *scales, int64_t entry, const float *x, int64_t n)
{
    if (kind == F32) {
        memcpy((float *)to + entry * n, x, 4 * n);
    } else if (kind == BF16) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            ((uint16_t *)to)[entry * n + i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
    } else {
        float largest = 1e-12f;
        for (int64_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
        const float scale = scales[entry] = largest / 127.0f;
        for (int64_t i = 0; i < n; i++) ((int8_t *)to)[entry * n + i] = (int8_t)rintf(x[i] / scale);
    }
}

/* The entries that token t attends to and their positions, itself the last; how many there are. */
static int64_t visible_entries(const Work *w, const Layer *l, int64_t t)
{
    const int64_t p = w->c->positions[t];
    int64_t n = 0, left;
    for (int64_t j = 0; j <= p;) {
        int64_t last = p; /* of a run of visible positions whose entries are neighbours */
        if (l->pattern == WINDOW) {
            if (j < l->sink_tokens) last = smaller(p, l->sink_tokens - 1);
            else if (j <= p - l->window) j = p - l->window + 1;
        } else if (l->pattern != FULL) {
            int is_near = l->pattern == STRIDED ? p - j < l->stride : p / l->stride == j / l->stride;
            int is_far = l->pattern == STRIDED ? (p - j) % l->stride == 0 : j % l->stride >= l->stride - l->summary;
            last = is_near || is_far ? j : j - 1;
        }
        if (l->ring && j < l->ring_sinks) last = smaller(last, l->ring_sinks - 1);
        const int64_t entry = entry_of(w, l, t, j, &left), run = smaller(last - j + 1, left);
        for (int64_t i = 0; i < run; i++) w->entries[n + i] = entry + i, w->positions[n + i] = j + i;
        n += run;
        j += run ? run : 1;
    }
    return n;
}

/* scores[i] = key of entry i · q, four at a time. */
INLINE void score_keys(const int kind, const Work *w, const Layer *l, int64_t n, int64_t shift, const float *q)
{
    const int64_t width = w->m->head_dim, size = kind == F32 ? 4 : kind == BF16 ? 2 : 1;
    for (int64_t i = 0; i < n; i += 4) {
        const char *key[4];
        vf total[4] = {{0}, {0}, {0}, {0}};
        UNROLL for (int a = 0; a < 4; a++)
            key[a] = (const char *)l->keys + (w->entries[smaller(i + a, n - 1)] + shift) * width * size;
        int64_t d = 0;
        for (; d + W <= width; d += W)
            UNROLL for (int a = 0; a < 4; a++) total[a] += load(kind, key[a], d, W) * load(F32, q, d, W);
        if (d < width)
            UNROLL for (int a = 0; a < 4; a++)
                total[a] += load(kind, key[a], d, width - d) * load(F32, q, d, width - d);
        v4 found = sums(total[0], total[1], total[2], total[3]);
        memcpy(w->scores + i, &found, sizeof found);
    }
    for (int64_t i = 0; kind == INT8 && i < n; i++) w->scores[i] *= l->key_scales[w->entries[i] + shift];
}

/* out[d … d + vectors · W) = the sum of the entries' values, each times its score, four at a time; a vector has `lanes`
   numbers. */
INLINE void sum_values(const int kind, const int vectors, const Work *w, const Layer *l, int64_t n, int64_t shift,
                       int64_t d, int64_t lanes, float *out)
{
    const int64_t size = kind == F32 ? 4 : kind == BF16 ? 2 : 1;
    vf total[4][4] = {{{0}}};
    for (int64_t i = 0; i < n; i += 4)
        UNROLL for (int a = 0; a < 4; a++) { /* scores behind the last are 0 */
            const int64_t entry = w->entries[smaller(i + a, n - 1)] + shift;
            const char *value = (const char *)l->values + (entry * w->m->head_dim + d) * size;
            UNROLL for (int v = 0; v < vectors; v++) total[a][v] += w->scores[i + a] * load(kind, value, v * W, lanes);
        }
    UNROLL for (int v = 0; v < vectors; v++)
        store(out + d + v * W, (total[0][v] + total[1][v]) + (total[2][v] + total[3][v]), lanes);
}

/* One query head over n entries, which stand `shift` behind those of head 0. */
INLINE void attend(const int kind, const Work *w, const Layer *l, int64_t n, int64_t shift, const float *q, float slope,
                   float *out)
{
    const Model *m = w->m;
    float *scores = w->scores;
    score_keys(kind, w, l, n, shift, q);
    for (int64_t i = 0; i < n; i += W) {
        vf s = load(F32, scores, i, W) * m->attention_scale;
        store(scores + i, m->attention_softcap > 0 ? capped(s, m->attention_softcap) : s, W);
    }
    for (int64_t i = 0; slope != 0.0f && i < n; i++) scores[i] += slope * (w->positions[i] - w->positions[n - 1]);
    for (int i = 0; i < W; i++) scores[n + i] = -INFINITY;
    vf most = (vf){0} - INFINITY, total = {0};
    for (int64_t i = 0; i < n; i += W) {
        vf s = load(F32, scores, i, W);
        most = where(s > most, s, most);
    }
    float largest = most[0];
    for (int a = 1; a < W; a++) largest = most[a] > largest ? most[a] : largest;
    for (int64_t i = 0; i < n; i += W) {
        vf e = exponential(load(F32, scores, i, W) - largest);
        store(scores + i, e, W);
        total += e;
    }
    const float factor = 1.0f / sum(total);
    for (int64_t i = 0; i < n; i++)
        scores[i] *= kind == INT8 ? factor * l->value_scales[w->entries[i] + shift] : factor;
    memset(scores + n, 0, 4 * sizeof *scores);
    int64_t d = 0;
    for (; d + 4 * W <= m->head_dim; d += 4 * W) sum_values(kind, 4, w, l, n, shift, d, W, out);
    for (; d + 2 * W <= m->head_dim; d += 2 * W) sum_values(kind, 2, w, l, n, shift, d, W, out);
    for (; d + W <= m->head_dim; d += W) sum_values(kind, 1, w, l, n, shift, d, W, out);
    if (d < m->head_dim) sum_values(kind, 1, w, l, n, shift, d, m->head_dim - d, out);
}

static void attend_head(const Work *w, const Layer *l, int64_t n, int64_t shift, const float *q, float slope,
                        float *out)
{
    if (l->cache_kind == F32) attend(F32, w, l, n, shift, q, slope, out);
    else if (l->cache_kind == BF16) attend(BF16, w, l, n, shift, q, slope, out);
    else attend(INT8, w, l, n, shift, q, slope, out);
}

/* --- the step ----------------------------------------------------------------------------------------------------- */

/* A sub-layer's input: few tokens are normalized by every thread for itself, which is cheaper than a barrier. */
static const float *normed(const Work *w, const Norm *norm, const int32_t *which, int64_t n)
{
    const Model *m = w->m;
    if (!norm) return w->x;
    const int is_shared = n > FEW && w->threads > 1;
    float *out = n > FEW ? w->normed : w->own;
    for (int64_t t = is_shared ? w->thread : 0; t < n; t += is_shared ? w->threads : 1)
        normalize(norm, m->is_layernorm, m->eps, w->x + (which ? which[t] : t) * w->d, out + t * w->d, m->d_model);
    if (is_shared) {
#pragma omp barrier
    }
    return out;
}

static void embed(const Work *w)
{
    const Model *m = w->m;
    for (int64_t t = w->thread; t < w->c->n; t += w->threads) {
        float *x = w->x + t * w->d;
        const float *added = m->positions ? m->positions + (int64_t)w->c->positions[t] * m->d_model : 0;
        read_row(&m->embedding, w->c->ids[t], x);
        for (int64_t i = 0; i < m->d_model; i++) x[i] = x[i] * m->embedding_scale + (added ? added[i] : 0.0f);
    }
}

/* From a layer's queries, keys and values: the latter into the cache, then attention. */
static void attention(const Work *w, const Layer *l, int shares_slots)
{
    const Model *m = w->m;
    const int64_t n = w->c->n, width = m->head_dim, group = m->n_heads / m->n_kv_heads;
    int64_t parts = 1, left; /* a group of query heads is one thread's, unless there are too few groups */
    while (n * m->n_kv_heads * parts < w->threads && parts < group) parts++;
    while (group % parts) parts++;
    const Span own = share(w, n * m->n_kv_heads);
    for (int64_t i = own.first; i < own.end; i++) {
        const int64_t t = i / m->n_kv_heads, head = i % m->n_kv_heads, position = w->c->positions[t];
        const int64_t entry = entry_of(w, l, t, position, &left) + head * l->block_size;
        float *key = w->keys + t * w->kv + head * width, *value = w->values + t * w->kv + head * width;
        prepare_head(m, &l->k_norm, key, position);
        write_entry(l->cache_kind, l->keys, l->key_scales, entry, key, width);
        write_entry(l->cache_kind, l->values, l->value_scales, entry, value, width);
    }
    if (shares_slots || parts > 1) { /* entries of another thread are attended to */
#pragma omp barrier
    }
    const Span items = share(w, n * m->n_kv_heads * parts); /* neighbours stand together in memory */
    for (int64_t i = items.first, seen = 0, last = -1; i < items.end; i++) {
        const int64_t t = i / (m->n_kv_heads * parts), head = i / parts % m->n_kv_heads, n_heads = group / parts;
        const int64_t first = head * group + i % parts * n_heads;
        if (t != last) seen = visible_entries(w, l, t), last = t;
        for (int64_t h = first; h < first + n_heads; h++) {
            float *q = w->queries + t * w->q + h * width, *out = w->attended + t * w->q + h * width;
            prepare_head(m, &l->q_norm, q, w->c->positions[t]);
            attend_head(w, l, seen, head * l->block_size, q, m->slopes ? m->slopes[h] : 0.0f, out);
        }
    }
}

/* The inside of the feed-forward layer. */
static void widen(const Work *w, const Layer *l, const float *x)
{
    const Span rows = share(w, w->m->d_ff);
    const int is_gated = l->gate.weight != 0;
    if (is_gated) multiply(&l->gate, rows, x, w->d, w->c->n, (Output){0, w->gate, 0, w->ff}, w->products);
    multiply(&l->up, rows, x, w->d, w->c->n, (Output){0, w->up, 0, w->ff}, w->products);
    for (int64_t t = 0; t < w->c->n; t++)
        for (int64_t i = rows.first; i < rows.end; i += W) {
            const int64_t lanes = smaller(W, rows.end - i), at = t * w->ff + i;
            vf up = load(F32, w->up, at, lanes), gate = is_gated ? load(F32, w->gate, at, lanes) : up;
            store(w->up + at, activated(w->m->activation, gate) * (is_gated ? up : (vf){0} + 1.0f), lanes);
        }
}

static void predict(const Work *w, const Norm *norm)
{
    if (!w->c->n_wanted) return;
    const float *x = normed(w, norm, w->c->wanted, w->c->n_wanted), cap = w->m->logit_softcap;
    const Span rows = share(w, w->m->vocab_size);
    multiply(&w->m->head, rows, x, w->d, w->c->n_wanted, (Output){0, w->c->logits, 0, w->m->vocab_size},
             w->products);
    for (int64_t t = 0; cap > 0 && t < w->c->n_wanted; t++)
        for (int64_t i = rows.first; i < rows.end; i += W) {
            float *at = w->c->logits + t * w->m->vocab_size + i;
            store(at, capped(load(F32, at, 0, smaller(W, rows.end - i)), cap), smaller(W, rows.end - i));
        }
}

/* What is wrong with a call, as a number that `native.py` has words for; 0: nothing. */
static int fault(const Model *m, const Call *c)
{
    if (c->n_layers < 1 || c->n_layers > m->n_layers) return 6;
    for (int64_t t = 0; t < c->n; t++) {
        if (c->ids[t] < 0 || c->ids[t] >= m->vocab_size) return 1;
        if (c->slots[t] < 0 || c->slots[t] >= c->n_slots) return 2;
        if (c->positions[t] < 0 || c->positions[t] >= m->reach) return 3;
        for (const Layer *l = m->layers; l < m->layers + m->n_layers; l++) {
            if (l > m->layers && l->block_size == l[-1].block_size && l->ring == l[-1].ring) continue;
            const int64_t last = smaller(c->positions[t], l->ring ? l->ring - 1 : INT64_MAX) / l->block_size;
            for (int64_t b = 0; b <= last; b++) {
                if (b >= m->table_width) return 3;
                const int32_t block = c->table[c->slots[t] * (int64_t)m->table_width + b];
                if (block < 0 || block >= l->n_blocks) return 4;
            }
        }
    }
    if (c->n_wanted > c->n) return 5;
    for (int64_t i = 0; i < c->n_wanted; i++)
        if (c->wanted[i] < 0 || c->wanted[i] >= c->n) return 5;
    return 0;
}

static int take_step(const Model *m, const Call *c)
{
    const int found = fault(m, c), is_post = m->is_post_norm;
    if (found || !c->n) return found;
    int shares_slots = 0;
    for (int64_t t = 1; t < c->n && !shares_slots; t++)
        for (int64_t u = 0; u < t; u++) shares_slots |= c->slots[t] == c->slots[u];
#pragma omp parallel num_threads(c->threads)
    {
        const Work work = layout(m, c, omp_get_thread_num(), omp_get_num_threads()), *w = &work;
        const Norm *after = 0; /* post-norm: what makes the last sum the next input */
        embed(w);
#pragma omp barrier
        for (const Layer *l = m->layers; l < m->layers + c->n_layers; l++) {
            const float *x = normed(w, is_post ? after : &l->attention_norm, 0, c->n);
            multiply(&l->q, share(w, l->q.rows), x, w->d, c->n, (Output){0, w->queries, 0, w->q}, w->products);
            multiply(&l->k, share(w, l->k.rows), x, w->d, c->n, (Output){0, w->keys, 0, w->kv}, w->products);
            multiply(&l->v, share(w, l->v.rows), x, w->d, c->n, (Output){0, w->values, 0, w->kv}, w->products);
#pragma omp barrier
            attention(w, l, shares_slots);
#pragma omp barrier
            const Span rows = share(w, m->d_model);
            multiply(&l->o, rows, w->attended, w->q, c->n, (Output){is_post ? x : w->x, w->x, w->d, w->d}, w->products);
#pragma omp barrier
            x = normed(w, is_post ? &l->attention_norm : &l->feedforward_norm, 0, c->n);
            widen(w, l, x);
#pragma omp barrier
            multiply(&l->down, rows, w->up, w->ff, c->n, (Output){is_post ? x : w->x, w->x, w->d, w->d}, w->products);
#pragma omp barrier
            after = &l->feedforward_norm;
        }
        predict(w, is_post ? after : &m->norm);
    }
    return 0;
}

int step(const Model *m, const Call *c) { return take_step(m, c); } /* glibc has a `step`, which calls from within find */

/* --- guesses ------------------------------------------------------------------------------------------------------ */

/* The weight from which on tokens are kept, the best one's being 1. Halving finds the border of top-k and top-p only
   nearly: any law will do for guesses, and the model's own filters are exact. */
static float least_weight(const float *weights, int64_t n, const float *settings, float total)
{
    const float top_k = settings[1], top_p = settings[2], min_p = settings[3];
    float low = 0.0f, high = 2.0f, middle = 1e-6f;
    for (int i = 0; i < 24 && (top_k > 0 || top_p < 1); i++, middle = sqrtf(fmaxf(low, 1e-9f) * high)) {
        vf mass = {0}, count = {0};
        for (int64_t j = 0; j < n; j += W) {
            vf x = load(F32, weights, j, smaller(W, n - j));
            mass += where(x >= middle, x, (vf){0});
            count += where(x >= middle, (vf){0} + 1.0f, (vf){0});
        }
        if (sum(mass) >= top_p * total || (top_k > 0 && sum(count) >= top_k)) low = middle;
        else high = middle;
    }
    return low > min_p ? low : min_p;
}

/* A token of the law that settings make of logits, and that law; at temperature 0 the most probable token. */
static int32_t draw(const float *logits, int64_t n, const float *settings, double uniform, float *law)
{
    float largest = logits[0];
    int64_t token = 0, i;
    for (i = 1; i < n; i++)
        if (logits[i] > largest) largest = logits[i], token = i;
    if (settings[0] == 0) return token;
    double total = 0, kept = 0, passed = 0, next;
    for (i = 0; i < n; i += W) {
        const int64_t lanes = smaller(W, n - i);
        store(law + i, exponential((load(F32, logits, i, lanes) - largest) / fmaxf(settings[0], 1e-30f)), lanes);
        total += sum(load(F32, law, i, lanes));
    }
    const float least = least_weight(law, n, settings, total);
    for (i = 0; i < n; i += W) {
        const vf x = load(F32, law, i, smaller(W, n - i));
        store(law + i, where(x >= least, x, (vf){0}), smaller(W, n - i));
        kept += sum(load(F32, law, i, smaller(W, n - i)));
    }
    for (i = 0; i + W < n && (next = passed + sum(load(F32, law, i, W))) <= uniform * kept; i += W) passed = next;
    for (; i < n && passed <= uniform * kept; i++)
        if (law[i] > 0) token = i, passed += law[i];
    for (i = 0; i < n; i++) law[i] /= (float)kept;
    return token;
}

/* Tokens one after the other behind each text of a call, whose one wanted token is its last. */
int guess(const Model *m, const Call *first, const Guesses *g)
{
    Call c = *first;
    const int64_t size = m->vocab_size;
    int32_t ids[c.n_wanted], slots[c.n_wanted], positions[c.n_wanted], wanted[c.n_wanted], text[c.n_wanted];
    for (int32_t i = 0; i < c.n_wanted; i++) text[i] = i;
    for (int64_t place = 0; c.n_wanted; place++) {
        const int found = take_step(m, &c);
        if (found) return found;
        int32_t n = 0;
        for (int32_t i = 0; i < c.n_wanted; i++) {
            const int64_t at = text[i] * (int64_t)g->length + place, from = c.wanted[i];
            float *law = g->laws ? g->laws + at * size : 0;
            g->tokens[at] = draw(c.logits + i * size, size, g->settings + 4 * text[i], g->uniforms[at], law);
            if (place + 1 >= g->most[text[i]]) continue;
            ids[n] = g->tokens[at], slots[n] = c.slots[from], positions[n] = c.positions[from] + 1;
            wanted[n] = n, text[n++] = text[i];
        }
        c.ids = ids, c.slots = slots, c.positions = positions, c.wanted = wanted, c.n = c.n_wanted = n;
    }
    return 0;
}
