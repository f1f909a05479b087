/* Pillow's resampling (src/libImaging/Resample.c), to the same bytes, in vector instructions.
 *
 * Called by _jpeg_region.c. The same coefficients, the same 22-bit fixed point, the same rounding between the horizontal
 * and the vertical pass. A product of a byte and a tap of 22 bits does not fit 16 bits, which is what vector
 * instructions multiply and add best: the taps are taken apart into upper and lower bits, and the sums put together
 * again, which changes nothing in them.
 */
#include "_resample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PRECISION_BITS (32 - 8 - 2)
#define HALF (1 << (PRECISION_BITS - 1))
#define LOW_BITS 11

static double bilinear(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/* For each group of four taps t0 … t3: t0 and t1 four times, t2 and t3 four times, each 16 bits; first their upper
 * halves, then their lower eleven bits. Returns 0, or -1 when there is no memory. */
static int split(Resample *resample)
{
    const int groups = resample->groups;
    resample->split = malloc(sizeof(int16_t) * 32 * groups * resample->size);
    if (!resample->split)
        return -1;
    int16_t *to = resample->split;
    for (int i = 0; i < resample->size; i++)
        for (int g = 0; g < groups; g++, to += 32)
            for (int j = 0; j < 16; j++) {
                const int32_t tap = resample->taps[i * resample->width + RESAMPLE_GROUP * g + 2 * (j / 8) + j % 2];
                to[j] = (int16_t)(tap >> LOW_BITS);
                to[16 + j] = (int16_t)(tap & ((1 << LOW_BITS) - 1));
            }
    return 0;
}

int resample_prepare(Resample *resample, int in_size, float in0, float in1, int size, int filter_support)
{
    double (*filter)(double) = filter_support == 1 ? bilinear : bicubic;
    double scale = (double)(in1 - in0) / size;
    double filter_scale = scale < 1.0 ? 1.0 : scale;
    double support = filter_support * filter_scale;
    int width = (int)ceil(support) * 2 + 1;
    width = (width + RESAMPLE_GROUP - 1) / RESAMPLE_GROUP * RESAMPLE_GROUP;
    double *weights = malloc(sizeof(double) * width);
    resample->size = size;
    resample->width = width;
    resample->low = malloc(sizeof(int) * size);
    resample->count = malloc(sizeof(int) * size);
    resample->taps = calloc((size_t)size * width, sizeof *resample->taps);
    resample->split = NULL;
    if (!weights || !resample->low || !resample->count || !resample->taps) {
        free(weights);
        return -1;
    }
    int most = 0;
    for (int i = 0; i < size; i++) {
        double center = in0 + (i + 0.5) * scale, sum = 0.0, step = 1.0 / filter_scale;
        int low = (int)(center - support + 0.5);
        if (low < 0)
            low = 0;
        int high = (int)(center + support + 0.5);
        if (high > in_size)
            high = in_size;
        int count = high - low;
        for (int j = 0; j < count; j++) {
            weights[j] = filter((j + low - center + 0.5) * step);
            sum += weights[j];
        }
        for (int j = 0; j < count; j++) {
            double weight = sum != 0.0 ? weights[j] / sum : weights[j];
            resample->taps[i * width + j] =
                (int)(weight < 0 ? -0.5 + weight * (1 << PRECISION_BITS) : 0.5 + weight * (1 << PRECISION_BITS));
        }
        resample->low[i] = low;
        resample->count[i] = count;
        most = count > most ? count : most;
    }
    free(weights);
    resample->groups = (most + RESAMPLE_GROUP - 1) / RESAMPLE_GROUP;
    return split(resample);
}


void resample_release(Resample *resample)
{
    free(resample->low);
    free(resample->count);
    free(resample->taps);
    free(resample->split);
}

static inline uint8_t clip(int32_t sum)
{
    int32_t value = sum >> PRECISION_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

static void horizontal_plain(const Resample *resample, const unsigned char *line, unsigned char *out)
{
    for (int i = 0; i < resample->size; i++) {
        const unsigned char *in = line + 4 * (size_t)resample->low[i];
        const int32_t *taps = resample->taps + (size_t)resample->width * i;
        int32_t sum[4] = {HALF, HALF, HALF, HALF};
        for (int j = 0; j < resample->count[i]; j++)
            for (int c = 0; c < 4; c++)
                sum[c] += in[4 * j + c] * taps[j];
        for (int c = 0; c < 4; c++)
            out[4 * i + c] = clip(sum[c]);
    }
}

static void vertical_plain(const Resample *resample, int at, const unsigned char *rows, size_t stride,
                           unsigned char *out)
{
    const int32_t *taps = resample->taps + (size_t)resample->width * at;
    for (size_t x = 0; x < stride; x += RESAMPLE_LANES) {
        int32_t sum[RESAMPLE_LANES];
        for (int i = 0; i < RESAMPLE_LANES; i++)
            sum[i] = HALF;
        for (int j = 0; j < resample->count[at]; j++)
            for (int i = 0; i < RESAMPLE_LANES; i++)
                sum[i] += rows[j * stride + x + i] * taps[j];
        for (int i = 0; i < RESAMPLE_LANES; i++)
            out[x + i] = clip(sum[i]);
    }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

/* The sums of one place: of its pixels' pairs, red, green, blue and nothing, twice. */
AVX2 static inline __attribute__((always_inline)) __m256i sums_of(const Resample *resample, const int groups, int i,
                                                                  const unsigned char *line)
{
    const __m128i pairs = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const unsigned char *in = line + 4 * (size_t)resample->low[i];
    const __m256i *taps = (const __m256i *)(resample->split + (size_t)32 * groups * i);
    __m256i high = _mm256_setzero_si256(), low = high;
    for (int g = 0; g < groups; g++, in += 4 * RESAMPLE_GROUP, taps += 2) {
        const __m256i pixels =
            _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)in), pairs));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(pixels, _mm256_loadu_si256(taps)));
        low = _mm256_add_epi32(low, _mm256_madd_epi16(pixels, _mm256_loadu_si256(taps + 1)));
    }
    return _mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low);
}

AVX2 static inline __attribute__((always_inline)) void horizontal_groups(const Resample *resample,
                                                                         const int groups,
                                                                         const unsigned char *line,
                                                                         unsigned char *out)
{
    const __m256i half = _mm256_set1_epi32(HALF);
    for (int i = 0; i < resample->size; i += 2) {
        const __m256i one = sums_of(resample, groups, i, line);
        const __m256i other = i + 1 < resample->size ? sums_of(resample, groups, i + 1, line) : one;
        __m256i both = _mm256_add_epi32(_mm256_permute2x128_si256(one, other, 0x20),
                                        _mm256_permute2x128_si256(one, other, 0x31));
        both = _mm256_srai_epi32(_mm256_add_epi32(both, half), PRECISION_BITS);
        both = _mm256_packs_epi32(both, both);
        both = _mm256_packus_epi16(both, both);
        const int32_t first = _mm256_extract_epi32(both, 0), second = _mm256_extract_epi32(both, 4);
        memcpy(out + 4 * i, &first, 4);
        if (i + 1 < resample->size)
            memcpy(out + 4 * i + 4, &second, 4);
    }
}

AVX2 static void horizontal_avx2(const Resample *resample, const unsigned char *line, unsigned char *out)
{
    if (resample->groups == 1) /* nearly all there are, without a loop */
        horizontal_groups(resample, 1, line, out);
    else if (resample->groups == 2)
        horizontal_groups(resample, 2, line, out);
    else
        horizontal_groups(resample, resample->groups, line, out);
}

AVX2 static void vertical_avx2(const Resample *resample, int at, const unsigned char *rows, size_t stride,
                               unsigned char *out)
{
    const __m256i half = _mm256_set1_epi32(HALF);
    const int pairs = (resample->count[at] + 1) / 2;
    for (size_t x = 0; x < stride; x += RESAMPLE_LANES) {
        const int32_t *taps = (const int32_t *)(resample->split + (size_t)32 * resample->groups * at);
        const unsigned char *in = rows + x;
        __m256i high[4], low[4];
        for (int i = 0; i < 4; i++)
            high[i] = low[i] = _mm256_setzero_si256();
        for (int pair = 0; pair < pairs; pair++, in += 2 * stride) {
            const __m256i one = _mm256_loadu_si256((const __m256i *)in);
            const __m256i other = _mm256_loadu_si256((const __m256i *)(in + stride));
            const int32_t *tap = taps + 16 * (pair / 2) + 4 * (pair % 2);
            const __m256i upper = _mm256_set1_epi32(tap[0]), lower = _mm256_set1_epi32(tap[8]);
            const __m256i zero = _mm256_setzero_si256();
            const __m256i left = _mm256_unpacklo_epi8(one, other), right = _mm256_unpackhi_epi8(one, other);
            const __m256i four[4] = {_mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                                     _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
            for (int i = 0; i < 4; i++) {
                high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(four[i], upper));
                low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(four[i], lower));
            }
        }
        for (int i = 0; i < 4; i++) {
            const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[i], LOW_BITS), low[i]);
            high[i] = _mm256_srai_epi32(_mm256_add_epi32(sum, half), PRECISION_BITS);
        }
        /* What unpacking took apart within each half, packing puts together. */
        const __m256i result =
            _mm256_packus_epi16(_mm256_packs_epi32(high[0], high[1]), _mm256_packs_epi32(high[2], high[3]));
        _mm256_storeu_si256((__m256i *)(out + x), result);
    }
}
#define CHOOSE(plain, avx2) (__builtin_cpu_supports("avx2") ? (avx2) : (plain))
#else
#define CHOOSE(plain, avx2) (plain)
#endif

void resample_horizontal(const Resample *resample, const unsigned char *line, unsigned char *out)
{
    CHOOSE(horizontal_plain, horizontal_avx2)(resample, line, out);
}

void resample_vertical(const Resample *resample, int at, const unsigned char *rows, size_t stride,
                       unsigned char *out)
{
    CHOOSE(vertical_plain, vertical_avx2)(resample, at, rows, stride, out);
}
