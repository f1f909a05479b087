/* Pillow's resampling of rows, by _resample.c, for _jpeg_region.c. */
#ifndef PRETRAIN_RESAMPLE_H
#define PRETRAIN_RESAMPLE_H

#include <stddef.h>
#include <stdint.h>

enum { RESAMPLE_GROUP = 4 }; /* taps used at once in a row; zeros fill them up */
enum { RESAMPLE_LANES = 32 }; /* bytes of a row worked on at once in columns */

/* How each of `size` places is made of those before it: `count[i]` of them from `low[i]` on, times
 * taps[i * width ...] in fixed point, zeros behind them. */
typedef struct {
    int size, width, groups; /* width: a multiple of RESAMPLE_GROUP; groups: of them, as many as any place needs */
    int *low, *count;
    int32_t *taps;
    int16_t *split; /* the taps once more, as vector instructions take them */
} Resample;

/* From in0 to in1 of `in_size` places to `size`; filter_support 1: bilinear, 2: bicubic. Returns 0, or -1 when there
 * is no memory. `resample_release` in either case. */
int resample_prepare(Resample *resample, int in_size, float in0, float in1, int size, int filter_support);
void resample_release(Resample *resample);

/* One row of RGBX pixels to `size` of them, from `line`, behind which RESAMPLE_GROUP + width pixels may be read. */
void resample_horizontal(const Resample *resample, const unsigned char *line, unsigned char *out);

/* Row `at` of the result from rows of `stride` bytes, a multiple of RESAMPLE_LANES; `rows` is row low[at], and
 * one behind its last may be read. */
void resample_vertical(const Resample *resample, int at, const unsigned char *rows, size_t stride,
                       unsigned char *out);

#endif
