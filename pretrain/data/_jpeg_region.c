/* Decode a part of a JPEG and resize it, to the very bytes that Pillow's decode and resize give.
 *
 * Called by region.py. The JPEG work is done by the libjpeg-turbo that Pillow itself has loaded, through its
 * libjpeg API: rows and columns outside the wanted part are not transformed. _jpeg_huffman.c reads the coefficients
 * for it, _resample.c makes the crop's size of it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_jpeg_huffman.h"
#include "_resample.h"

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
    int (*finish)(Jpeg);
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
    Huffman *huffman; /* NULL: libjpeg decodes the coefficients itself */
    /* what is asked for */
    int denominator, side, support, planar;
    int x0, y0, x1, y1;             /* the window that is decoded, in pixels of the reduced image */
    float left, top, right, bottom; /* the box that is resized, from the window's corner */
    /* buffers, freed by `release` */
    Resample across, down;
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

static void fail_in_huffman(Jpeg jpeg, const char *message) { fail_with((Job *)jpeg, message); }

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
    huffman_release(job->huffman);
    resample_release(&job->across);
    resample_release(&job->down);
    free(job->line);
    free(job->pixels);
}

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

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
    job->huffman = huffman_take_over(jpeg, fail_in_huffman);

    const int W = jpeg->output_width, H = jpeg->output_height, side = job->side;
    const int columns = job->x1 - job->x0, rows = job->y1 - job->y0;
    if (!(0 <= job->x0 && columns > 0 && job->x1 <= W && 0 <= job->y0 && rows > 0 && job->y1 <= H &&
          0 <= job->left && job->left < job->right && job->right <= columns && 0 <= job->top &&
          job->top < job->bottom && job->bottom <= rows))
        fail_with(job, "the box is not inside the image");
    Resample *across = &job->across, *down = &job->down;
    if (resample_prepare(across, columns, job->left, job->right, side, job->support) ||
        resample_prepare(down, rows, job->top, job->bottom, side, job->support))
        fail_with(job, "out of memory");
    const int y_first = down->low[0], y_last = down->low[side - 1] + down->count[side - 1];

    /* The columns at a crop's edges are upsampled as if the image ended there: some to spare on both sides. */
    const int spare = 4;
    unsigned int x_offset = job->x0 > spare ? job->x0 - spare : 0;
    unsigned int x_end = job->x1 + spare < W ? job->x1 + spare : W;
    unsigned int crop_width = x_end - x_offset;
    lib.crop(jpeg, &x_offset, &crop_width);

    const size_t stride = (4 * (size_t)side + RESAMPLE_LANES - 1) / RESAMPLE_LANES * RESAMPLE_LANES;
    job->line = calloc(crop_width + across->width + RESAMPLE_GROUP + 1, 4);
    job->pixels = calloc(stride, (size_t)(y_last - y_first) + 1);
    if (!job->line || !job->pixels)
        fail_with(job, "out of memory");
    for (int i = 0; i < side; i++)
        across->low[i] += job->x0 - (int)x_offset;

    const unsigned int above = job->y0 + y_first;
    if (above > 0 && lib.skip(jpeg, above) != above)
        fail_with(job, "the file ends too early");
    /* One pixel off: to aligned lines libjpeg-turbo writes around the caches, where reading them takes four times as long
     * as resizing them. */
    unsigned char *line = job->line + 4;
    for (int y = 0; y < y_last - y_first; y++) {
        if (lib.read(jpeg, &line, 1) != 1)
            fail_with(job, "the file ends too early");
        resample_horizontal(across, line, job->pixels + y * stride);
    }
    /* What lies below is read too, though not transformed: whether an image counts as damaged must not depend
     * on the crop. Anything odd is left to Pillow. */
    const unsigned int below = H - above - (y_last - y_first);
    if (below > 1 && lib.skip(jpeg, below - 1) != below - 1) /* all of them it would leave unread */
        fail_with(job, "the file ends too early");
    if (below > 0 && lib.read(jpeg, &line, 1) != 1)
        fail_with(job, "the file ends too early");
    if (!job->huffman) /* which has seen what follows: the image's end */
        lib.finish(jpeg);
    if (job->errors.num_warnings)
        fail_with(job, "damaged");
    /* The line buffer serves for the result's rows. */
    unsigned char *result = realloc(job->line, stride);
    if (!result)
        fail_with(job, "out of memory");
    job->line = result;
    for (int y = 0; y < side; y++) {
        resample_vertical(down, y, job->pixels + (down->low[y] - y_first) * stride, stride, result);
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
        {"jpeg_finish_decompress", (void **)&lib.finish},
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
