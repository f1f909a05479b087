/* Decode a part of a JPEG and resize it, to the very bytes that Pillow's decode and resize give.
 *
 * Called by region.py. The JPEG work is done by the libjpeg-turbo that Pillow itself has loaded, through its
 * libjpeg API: rows and columns outside the wanted part are not transformed. The resize is Pillow's
 * (src/libImaging/Resample.c): the same coefficients, the same 22-bit fixed point, the same rounding between
 * the horizontal and the vertical pass; only laid out so that compilers turn it into vector instructions.
 *
 * The declarations of libjpeg's ABI version 62 below are taken from jpeglib.h of libjpeg-turbo,
 * Copyright (C) 1991-1998, Thomas G. Lane; (C) 2009-2023, D. R. Commander (IJG and BSD licences). The library
 * itself checks version and structure size when a decompressor is created, and refuses another ABI.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---- libjpeg, ABI 62 ---- */

#define LIBJPEG_VERSION 62
enum { JCS_GRAYSCALE = 1, JCS_RGB = 2, JCS_YCBCR = 3, JCS_EXT_RGBX = 7 };
#define MARKER_APP1 0xE1

typedef struct jpeg_decompress_struct *Jpeg;

struct jpeg_error_mgr {
    void (*error_exit)(Jpeg);
    void (*emit_message)(Jpeg, int);
    void (*output_message)(Jpeg);
    void (*format_message)(Jpeg, char *);
    void (*reset_error_mgr)(Jpeg);
    int msg_code;
    union { int i[8]; char s[80]; } msg_parm;
    int trace_level;
    long num_warnings;
    const char *const *jpeg_message_table;
    int last_jpeg_message;
    const char *const *addon_message_table;
    int first_addon_message, last_addon_message;
};

struct jpeg_source_mgr {
    const unsigned char *next_input_byte;
    size_t bytes_in_buffer;
    void (*init_source)(Jpeg);
    int (*fill_input_buffer)(Jpeg);
    void (*skip_input_data)(Jpeg, long);
    int (*resync_to_restart)(Jpeg, int);
    void (*term_source)(Jpeg);
};

struct jpeg_marker_struct {
    struct jpeg_marker_struct *next;
    uint8_t marker;
    unsigned int original_length, data_length;
    unsigned char *data;
};

struct jpeg_decompress_struct {
    struct jpeg_error_mgr *err;
    void *mem, *progress, *client_data;
    int is_decompressor, global_state;
    struct jpeg_source_mgr *src;
    unsigned int image_width, image_height;
    int num_components, jpeg_color_space, out_color_space;
    unsigned int scale_num, scale_denom;
    double output_gamma;
    int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing, quantize_colors;
    int dither_mode, two_pass_quantize, desired_number_of_colors;
    int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
    unsigned int output_width, output_height;
    int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
    void *colormap;
    unsigned int output_scanline;
    int input_scan_number;
    unsigned int input_iMCU_row;
    int output_scan_number;
    unsigned int output_iMCU_row;
    void *coef_bits;
    void *quant_tbl_ptrs[4], *dc_huff_tbl_ptrs[4], *ac_huff_tbl_ptrs[4];
    int data_precision;
    void *comp_info;
    int progressive_mode, arith_code;
    uint8_t arith_dc_L[16], arith_dc_U[16], arith_ac_K[16];
    unsigned int restart_interval;
    int saw_JFIF_marker;
    uint8_t JFIF_major_version, JFIF_minor_version, density_unit;
    uint16_t X_density, Y_density;
    int saw_Adobe_marker;
    uint8_t Adobe_transform;
    int CCIR601_sampling;
    struct jpeg_marker_struct *marker_list;
    int max_h_samp_factor, max_v_samp_factor, min_DCT_scaled_size;
    unsigned int total_iMCU_rows;
    void *sample_range_limit;
    int comps_in_scan;
    void *cur_comp_info[4];
    unsigned int MCUs_per_row, MCU_rows_in_scan;
    int blocks_in_MCU, MCU_membership[10], Ss, Se, Ah, Al, unread_marker;
    void *links[11];
};

static struct {
    struct jpeg_error_mgr *(*std_error)(struct jpeg_error_mgr *);
    void (*create)(Jpeg, int, size_t);
    void (*destroy)(Jpeg);
    void (*save_markers)(Jpeg, int, unsigned int);
    int (*read_header)(Jpeg, int);
    int (*start)(Jpeg);
    void (*crop)(Jpeg, unsigned int *, unsigned int *);
    unsigned int (*skip)(Jpeg, unsigned int);
    unsigned int (*read)(Jpeg, unsigned char **, unsigned int);
    int (*resync)(Jpeg, int);
} lib;

/* ---- one image ---- */

typedef struct {
    struct jpeg_decompress_struct jpeg; /* first: libjpeg's callbacks get a pointer to it */
    struct jpeg_error_mgr errors;
    struct jpeg_source_mgr source;
    jmp_buf on_error;
    char message[200]; /* JMSG_LENGTH_MAX; empty: no error so far */
    int created;
    /* what is asked for */
    int denominator, side, support, planar;
    int x0, y0, x1, y1;             /* the window that is decoded, in pixels of the reduced image */
    float left, top, right, bottom; /* the box that is resized, from the window's corner */
    /* buffers, freed by `release` */
    int *x_bounds, *y_bounds, *x_taps, *y_taps;
    int32_t *x_wide;
    unsigned char *line, *pixels, *out; /* out belongs to the caller */
} Job;

static void fail(Jpeg jpeg)
{
    Job *job = (Job *)jpeg;
    jpeg->err->format_message(jpeg, job->message);
    if (!job->message[0])
        strcpy(job->message, "damaged");
    longjmp(job->on_error, 1);
}

static void fail_with(Job *job, const char *message)
{
    strncpy(job->message, message, sizeof job->message - 1);
    longjmp(job->on_error, 1);
}

static void count_warning(Jpeg jpeg, int level)
{
    if (level < 0)
        jpeg->err->num_warnings++;
}

static void nothing(Jpeg jpeg) { (void)jpeg; }

static int at_the_end(Jpeg jpeg)
{
    fail_with((Job *)jpeg, "the file ends too early");
    return 0;
}

static void skip_input(Jpeg jpeg, long count)
{
    if (count <= 0)
        return;
    if ((size_t)count > jpeg->src->bytes_in_buffer)
        at_the_end(jpeg);
    jpeg->src->next_input_byte += count;
    jpeg->src->bytes_in_buffer -= count;
}

/* Inside setjmp's reach. */
static void open_jpeg(Job *job, const Py_buffer *data)
{
    Jpeg jpeg = &job->jpeg;
    jpeg->err = lib.std_error(&job->errors);
    job->errors.error_exit = fail;
    job->errors.emit_message = count_warning;
    job->errors.output_message = nothing;
    lib.create(jpeg, LIBJPEG_VERSION, sizeof *jpeg);
    job->created = 1;
    job->source.next_input_byte = data->buf;
    job->source.bytes_in_buffer = data->len;
    job->source.init_source = nothing;
    job->source.fill_input_buffer = at_the_end;
    job->source.skip_input_data = skip_input;
    job->source.resync_to_restart = lib.resync;
    job->source.term_source = nothing;
    jpeg->src = &job->source;
}

static void release(Job *job)
{
    if (job->created)
        lib.destroy(&job->jpeg);
    free(job->x_bounds);
    free(job->y_bounds);
    free(job->x_taps);
    free(job->y_taps);
    free(job->x_wide);
    free(job->line);
    free(job->pixels);
}

/* ---- Pillow's resampling ---- */

#define PRECISION_BITS (32 - 8 - 2)

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

/* For each of `out_size` places: bounds[2i] the first input, bounds[2i+1] how many, taps[i*width+j] the
 * coefficients in fixed point, zeros behind them. Returns `width`, or 0 when there is no memory. */
static int coefficients(int in_size, float in0, float in1, int out_size, int filter_support, int **bounds,
                        int **taps)
{
    double (*filter)(double) = filter_support == 1 ? bilinear : bicubic;
    double scale = (double)(in1 - in0) / out_size;
    double filter_scale = scale < 1.0 ? 1.0 : scale;
    double support = filter_support * filter_scale;
    int width = ((int)ceil(support) * 2 + 1 + 1) & ~1; /* even: they are used two at a time */
    double *weights = malloc(sizeof(double) * width);
    *bounds = malloc(sizeof(int) * 2 * out_size);
    *taps = calloc((size_t)out_size * width, sizeof(int));
    if (!weights || !*bounds || !*taps) {
        free(weights);
        return 0;
    }
    for (int i = 0; i < out_size; i++) {
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
            (*taps)[i * width + j] =
                (int)(weight < 0 ? -0.5 + weight * (1 << PRECISION_BITS) : 0.5 + weight * (1 << PRECISION_BITS));
        }
        (*bounds)[2 * i] = low;
        (*bounds)[2 * i + 1] = count;
    }
    free(weights);
    return width;
}

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

static inline uint8_t clip(int32_t sum)
{
    int32_t value = sum >> PRECISION_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

#define HALF (1 << (PRECISION_BITS - 1))

/* One row of RGBX pixels to `side` of them. wide: the taps, four times each, `width` of them a pixel, of which
 * no pixel has more than `used`: one number for all keeps the inner loop's end predictable. */
static void horizontal_plain(const unsigned char *line, const int *bounds, const int32_t *wide, int width,
                             int used, int side, unsigned char *out)
{
    for (int i = 0; i < side; i++) {
        const unsigned char *in = line + 4 * (size_t)bounds[2 * i];
        const int32_t *taps = wide + (size_t)4 * width * i;
        int32_t sum[4] = {HALF, HALF, HALF, HALF};
        for (int j = 0; j < 4 * used; j += 4)
            for (int c = 0; c < 4; c++)
                sum[c] += in[j + c] * taps[j + c];
        for (int c = 0; c < 4; c++)
            out[4 * i + c] = clip(sum[c]);
    }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

/* The same, two pixels at a time: compilers do not find it in the above. */
__attribute__((target("avx2"))) static void horizontal_avx2(const unsigned char *line, const int *bounds,
                                                            const int32_t *wide, int width, int used,
                                                            int side, unsigned char *out)
{
    const __m128i half = _mm_set1_epi32(HALF);
    for (int i = 0; i < side; i++) {
        const unsigned char *in = line + 4 * (size_t)bounds[2 * i];
        const int32_t *taps = wide + (size_t)4 * width * i;
        __m256i sum = _mm256_setzero_si256();
        for (int j = 0; j < 4 * used; j += 8) {
            __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(in + j)));
            sum = _mm256_add_epi32(
                sum, _mm256_mullo_epi32(pixels, _mm256_loadu_si256((const __m256i *)(taps + j))));
        }
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        four = _mm_srai_epi32(_mm_add_epi32(four, half), PRECISION_BITS);
        four = _mm_packs_epi32(four, four);
        const int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(four, four));
        memcpy(out + 4 * i, &packed, 4);
    }
}
#endif

static void horizontal(const unsigned char *line, const int *bounds, const int32_t *wide, int width, int used,
                       int side, unsigned char *out)
{
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (__builtin_cpu_supports("avx2")) {
        horizontal_avx2(line, bounds, wide, width, used, side, out);
        return;
    }
#endif
    horizontal_plain(line, bounds, wide, width, used, side, out);
}

#define LANES 64

/* `count` rows of `stride` bytes, a multiple of LANES, to one. */
FOR_EACH_CPU static void vertical(const unsigned char *rows, size_t stride, const int *taps, int count,
                                  unsigned char *out)
{
    for (size_t x = 0; x < stride; x += LANES) {
        int32_t sum[LANES];
        for (int i = 0; i < LANES; i++)
            sum[i] = HALF;
        for (int j = 0; j < count; j++) {
            const unsigned char *row = rows + j * stride + x;
            const int32_t tap = taps[j];
            for (int i = 0; i < LANES; i++)
                sum[i] += row[i] * tap;
        }
        for (int i = 0; i < LANES; i++)
            out[x + i] = clip(sum[i]);
    }
}

/* RGBX pixels to three planes. */
FOR_EACH_CPU static void separate(const unsigned char *row, int side, unsigned char *red, unsigned char *green,
                                  unsigned char *blue)
{
    for (int i = 0; i < side; i++) {
        red[i] = row[4 * i];
        green[i] = row[4 * i + 1];
        blue[i] = row[4 * i + 2];
    }
}

/* ---- the whole way ---- */

/* Returns 0, or -1 with job->message set. */
static int decode(Job *job, const Py_buffer *data)
{
    Jpeg jpeg = &job->jpeg;
    if (setjmp(job->on_error))
        return -1;
    open_jpeg(job, data);
    lib.read_header(jpeg, 1);
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->scale_num = 1;
    jpeg->scale_denom = job->denominator;
    lib.start(jpeg);

    const int W = jpeg->output_width, H = jpeg->output_height, side = job->side;
    const int columns = job->x1 - job->x0, rows = job->y1 - job->y0;
    if (!(0 <= job->x0 && columns > 0 && job->x1 <= W && 0 <= job->y0 && rows > 0 && job->y1 <= H &&
          0 <= job->left && job->left < job->right && job->right <= columns && 0 <= job->top &&
          job->top < job->bottom && job->bottom <= rows))
        fail_with(job, "the box is not inside the image");
    int width = coefficients(columns, job->left, job->right, side, job->support, &job->x_bounds, &job->x_taps);
    int height = coefficients(rows, job->top, job->bottom, side, job->support, &job->y_bounds, &job->y_taps);
    if (!width || !height)
        fail_with(job, "out of memory");
    const int y_first = job->y_bounds[0];
    const int y_last = job->y_bounds[2 * side - 2] + job->y_bounds[2 * side - 1];

    /* The columns at a crop's edges are upsampled as if the image ended there: some to spare on both sides. */
    const int spare = 4;
    unsigned int x_offset = job->x0 > spare ? job->x0 - spare : 0;
    unsigned int x_end = job->x1 + spare < W ? job->x1 + spare : W;
    unsigned int crop_width = x_end - x_offset;
    lib.crop(jpeg, &x_offset, &crop_width);

    const int row_bytes = 4 * side;
    const size_t stride = (row_bytes + LANES - 1) / LANES * LANES;
    job->line = malloc(4 * ((size_t)crop_width + width + 16));
    job->pixels = calloc(stride, (size_t)(y_last - y_first) + 1);
    job->x_wide = malloc(sizeof(int32_t) * 4 * width * side);
    if (!job->line || !job->pixels || !job->x_wide)
        fail_with(job, "out of memory");
    memset(job->line, 0, 4 * ((size_t)crop_width + width + 16));
    for (int i = 0; i < width * side; i++)
        for (int c = 0; c < 4; c++)
            job->x_wide[4 * i + c] = job->x_taps[i];
    int used = 0;
    for (int i = 0; i < side; i++)
        used = job->x_bounds[2 * i + 1] > used ? job->x_bounds[2 * i + 1] : used;
    for (int i = 0; i < side; i++)
        job->x_bounds[2 * i] += job->x0 - (int)x_offset;

    const unsigned int above = job->y0 + y_first;
    if (above > 0 && lib.skip(jpeg, above) != above)
        fail_with(job, "the file ends too early");
    unsigned char *line = job->line;
    for (int y = 0; y < y_last - y_first; y++) {
        if (lib.read(jpeg, &line, 1) != 1)
            fail_with(job, "the file ends too early");
        horizontal(line, job->x_bounds, job->x_wide, width, used, side, job->pixels + y * stride);
    }
    /* What lies below is read too, though not transformed: whether an image counts as damaged must not depend
     * on the crop. Anything odd is left to Pillow. */
    const unsigned int below = H - above - (y_last - y_first);
    if (below > 1 && lib.skip(jpeg, below - 1) != below - 1) /* all of them it would leave unread */
        fail_with(job, "the file ends too early");
    if (below > 0 && lib.read(jpeg, &line, 1) != 1)
        fail_with(job, "the file ends too early");
    if (job->errors.num_warnings)
        fail_with(job, "damaged");
    /* The line buffer serves for the result's rows. */
    unsigned char *result = realloc(job->line, stride);
    if (!result)
        fail_with(job, "out of memory");
    job->line = result;
    for (int y = 0; y < side; y++) {
        vertical(job->pixels + (job->y_bounds[2 * y] - y_first) * stride, stride, job->y_taps + y * height,
                 job->y_bounds[2 * y + 1], result);
        const size_t plane = (size_t)side * side, at = (size_t)y * side;
        if (job->planar)
            separate(result, side, job->out + at, job->out + plane + at, job->out + 2 * plane + at);
        else
            for (int i = 0; i < side; i++)
                memcpy(job->out + 3 * (at + i), result + 4 * i, 3);
    }
    return 0;
}

static int read_head(Job *job, const Py_buffer *data)
{
    if (setjmp(job->on_error))
        return -1;
    open_jpeg(job, data);
    lib.save_markers(&job->jpeg, MARKER_APP1, 0xFFFF);
    lib.read_header(&job->jpeg, 1);
    return 0;
}

/* ---- Python ---- */

static PyObject *py_open(PyObject *self, PyObject *path)
{
    (void)self;
    const char *name = PyUnicode_AsUTF8(path);
    if (!name)
        return NULL;
    void *handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return PyErr_Format(PyExc_OSError, "%s", dlerror());
    const struct { const char *name; void **to; } symbols[] = {
        {"jpeg_std_error", (void **)&lib.std_error},
        {"jpeg_CreateDecompress", (void **)&lib.create},
        {"jpeg_destroy_decompress", (void **)&lib.destroy},
        {"jpeg_save_markers", (void **)&lib.save_markers},
        {"jpeg_read_header", (void **)&lib.read_header},
        {"jpeg_start_decompress", (void **)&lib.start},
        {"jpeg_crop_scanline", (void **)&lib.crop},
        {"jpeg_skip_scanlines", (void **)&lib.skip},
        {"jpeg_read_scanlines", (void **)&lib.read},
        {"jpeg_resync_to_restart", (void **)&lib.resync},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++)
        if (!(*symbols[i].to = dlsym(handle, symbols[i].name)))
            return PyErr_Format(PyExc_OSError, "%s: no %s", name, symbols[i].name);
    Job *job = calloc(1, sizeof *job);
    if (!job)
        return PyErr_NoMemory();
    Py_buffer none = {0};
    volatile int refused = 1;
    if (!setjmp(job->on_error)) {
        open_jpeg(job, &none);
        refused = 0;
    }
    release(job);
    if (refused)
        PyErr_Format(PyExc_OSError, "%s: %s", name, job->message);
    free(job);
    if (refused)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_header(PyObject *self, PyObject *object)
{
    (void)self;
    Py_buffer data;
    if (PyObject_GetBuffer(object, &data, PyBUF_SIMPLE))
        return NULL;
    Job *job = calloc(1, sizeof *job);
    PyObject *result = NULL;
    if (!job) {
        PyErr_NoMemory();
    } else if (read_head(job, &data)) {
        PyErr_SetString(PyExc_ValueError, job->message);
    } else {
        Jpeg jpeg = &job->jpeg;
        int space = jpeg->jpeg_color_space;
        int plain = jpeg->data_precision == 8 &&
                    ((jpeg->num_components == 1 && space == JCS_GRAYSCALE) ||
                     (jpeg->num_components == 3 && (space == JCS_RGB || space == JCS_YCBCR)));
        const struct jpeg_marker_struct *marker = jpeg->marker_list;
        while (marker && !(marker->data_length >= 6 && !memcmp(marker->data, "Exif\0\0", 6)))
            marker = marker->next;
        result = Py_BuildValue("IIiiy#", jpeg->image_width, jpeg->image_height, plain, jpeg->progressive_mode,
                               marker ? (const char *)marker->data : "",
                               (Py_ssize_t)(marker ? marker->data_length : 0));
    }
    if (job)
        release(job);
    free(job);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *py_region(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data;
    Job *job = calloc(1, sizeof *job);
    if (!job)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "y*i(iiii)(ffff)iip", &data, &job->denominator, &job->x0, &job->y0,
                          &job->x1, &job->y1, &job->left, &job->top, &job->right,
                          &job->bottom, &job->side, &job->support, &job->planar)) {
        free(job);
        return NULL;
    }
    PyObject *result = NULL;
    if (job->side <= 0 || job->side > 1 << 14 || (job->support != 1 && job->support != 2))
        PyErr_SetString(PyExc_ValueError, "side or filter out of range");
    else
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)3 * job->side * job->side);
    if (result) {
        int failed;
        job->out = (unsigned char *)PyBytes_AS_STRING(result);
        Py_BEGIN_ALLOW_THREADS
        failed = decode(job, &data);
        Py_END_ALLOW_THREADS
        if (failed) {
            Py_CLEAR(result);
            PyErr_SetString(PyExc_ValueError, job->message);
        }
    }
    release(job);
    free(job);
    PyBuffer_Release(&data);
    return result;
}

static PyMethodDef methods[] = {
    {"open", py_open, METH_O, "open(path): use this libjpeg-turbo. OSError if it is none of ABI 62."},
    {"header", py_header, METH_O,
     "header(data) -> (width, height, plain, progressive, exif). ValueError if it is no JPEG."},
    {"region", py_region, METH_VARARGS,
     "region(data, denominator, window, box, side, support, planar) -> bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg_region", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_region(void) { return PyModule_Create(&module); }
