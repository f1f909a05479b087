/* The members of a tar that holds plain files only, in one pass. Called by tar.py, whose `plain_members` is the same in
 * Python and says what plain means.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

enum { BLOCK = 512, NAME = 100, SIZE_AT = 124, SIZE_DIGITS = 11, SIZE_FIELD = 12, SUM_AT = 148, SUM_DIGITS = 6, SUM_FIELD = 8,
       TYPE_AT = 156, MAGIC_AT = 257, PREFIX_AT = 345 };

/* Returns -1 if not all of them are octal digits, or the rest of the field holds more than NULs and blanks. */
static int64_t octal(const unsigned char *digits, int count, int field)
{
    int64_t value = 0;
    for (int i = 0; i < count; i++) {
        if (digits[i] < '0' || digits[i] > '7')
            return -1;
        value = value * 8 + (digits[i] - '0');
    }
    for (int i = count; i < field; i++)
        if (digits[i] && digits[i] != ' ')
            return -1;
    return value;
}

/* The length of a plain header's name, or 0 if the header is of another kind or damaged. */
static int name_length(const unsigned char *header)
{
    int64_t sum = SUM_FIELD * ' '; /* the checksum's own field counts as blanks */
    for (int i = 0; i < SUM_AT; i++)
        sum += header[i];
    for (int i = SUM_AT + SUM_FIELD; i < BLOCK; i++)
        sum += header[i];
    const unsigned char *end = memchr(header, 0, NAME);
    if (octal(header + SUM_AT, SUM_DIGITS, SUM_FIELD) != sum || header[TYPE_AT] != '0' || header[PREFIX_AT] ||
        memcmp(header + MAGIC_AT, "ustar", 5) || !end)
        return 0;
    for (const unsigned char *rest = end; rest < header + NAME; rest++)
        if (*rest)
            return 0;
    return (int)(end - header);
}

static int all_zero(const unsigned char *from, Py_ssize_t count)
{
    return count == 0 || (from[0] == 0 && !memcmp(from, from + 1, count - 1));
}

/* Fills data and sizes, if they are not NULL, and `longest`. Returns how many members there are, 0 if not all
 * are plain. */
static Py_ssize_t walk(const Py_buffer *tar, int64_t *data, int64_t *sizes, int *longest)
{
    const unsigned char *buffer = tar->buf;
    Py_ssize_t at = 0, count = 0;
    *longest = 0;
    while (tar->len - at >= BLOCK) {
        const int64_t size = octal(buffer + at + SIZE_AT, SIZE_DIGITS, SIZE_FIELD);
        if (size < 0)
            break; /* the end mark, or another kind of header */
        const int length = name_length(buffer + at);
        const int64_t whole = BLOCK + (size + BLOCK - 1) / BLOCK * BLOCK; /* below 2^33 */
        if (!length || whole > tar->len - at)
            return 0;
        if (data) {
            data[count] = at + BLOCK;
            sizes[count] = size;
        }
        *longest = length > *longest ? length : *longest;
        count++;
        at += whole;
    }
    const Py_ssize_t left = tar->len - at;
    return (left && left < BLOCK) || !all_zero(buffer + at, left) ? 0 : count;
}

static PyObject *py_plain(PyObject *self, PyObject *object)
{
    (void)self;
    Py_buffer tar;
    if (PyObject_GetBuffer(object, &tar, PyBUF_SIMPLE))
        return NULL;
    int longest;
    const Py_ssize_t count = walk(&tar, NULL, NULL, &longest);
    PyObject *result = NULL, *names = NULL, *data = NULL, *sizes = NULL;
    if (count == 0) {
        result = Py_NewRef(Py_None);
    } else {
        const Py_ssize_t width = longest + 1;
        names = PyBytes_FromStringAndSize(NULL, count * width);
        data = PyBytes_FromStringAndSize(NULL, count * sizeof(int64_t));
        sizes = PyBytes_FromStringAndSize(NULL, count * sizeof(int64_t));
    }
    if (names && data && sizes) {
        int64_t *starts = (int64_t *)PyBytes_AS_STRING(data);
        walk(&tar, starts, (int64_t *)PyBytes_AS_STRING(sizes), &longest);
        for (Py_ssize_t i = 0; i < count; i++)
            memcpy(PyBytes_AS_STRING(names) + i * (longest + 1), (char *)tar.buf + starts[i] - BLOCK, longest + 1);
        result = PyTuple_Pack(3, names, data, sizes);
    }
    Py_XDECREF(names);
    Py_XDECREF(data);
    Py_XDECREF(sizes);
    PyBuffer_Release(&tar);
    return result;
}

static PyMethodDef methods[] = {
    {"plain", py_plain, METH_O,
     "plain(tar) -> (names, data, sizes), or None: NUL-padded names of one width, and int64s, as bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_tar_members", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__tar_members(void) { return PyModule_Create(&module); }
