/* The Huffman codes of a JPEG's scan, decoded in half the time that libjpeg-turbo takes for it.
 *
 * Called by _jpeg_region.c. Half of the time that a crop takes goes into these codes, since all up to the crop must be
 * read whether wanted or not. libjpeg-turbo looks up a code of up to 8 bits, then extracts the value's bits and
 * extends their sign; here one table of 11 bits gives run, value and length at once, for nearly all there are (after
 * an idea in stb_image by Sean Barrett), and the bits come 8 bytes at a time out of a copy of the scan
 * without the zeros that are stuffed behind bytes of 0xFF (after Fabian Giesen, "Reading bits in far too many ways").
 * The decoder is put in the place of libjpeg's own, decode_mcu of jpegint.h; everything else stays libjpeg's.
 *
 * Only for the common kind: one sequential scan without restart markers that ends with the image. Whatever looks
 * damaged ends in `fail`: others judge what is to be made of it.
 */
#define _GNU_SOURCE /* dladdr */
#include "_jpeg_huffman.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* An entry of `look` covers a value, two, or a value and the end of the block, as many as its bits hold. From
 * its lowest byte:
 *   how many bits it covers
 *   how far it advances in the block; with END if the block ends there; OTHER if the bits do not hold one value
 *   how far the first value advances: the zeros before it, and itself
 *   for OTHER: the symbol, if the first byte is not 0; else the code is longer
 *   two bytes for the first value, two for the second, which is the first once more where there is none.
 * What has no value sets the next coefficient to 0, which it is anyway. */
#define LENGTH(entry) ((entry) & 63) /* 63: the least a shift instruction looks at, so that nothing need be masked */
#define ADVANCE(entry) ((entry) >> 8 & 0xFF)
#define FIRST_ADVANCE(entry) ((entry) >> 16 & 0xFF)
#define SYMBOL_IN(entry) ((entry) >> 24 & 0xFF)
#define FIRST_VALUE(entry) ((int16_t)((entry) >> 32))
#define SECOND_VALUE(entry) ((int16_t)((entry) >> 48))
#define END 64
#define OTHER 128
#define ENTRY(length, advance, first, symbol, value, second) \
    ((uint64_t)(uint16_t)(second) << 48 | (uint64_t)(uint16_t)(value) << 32 | (uint64_t)(symbol) << 24 | \
     (uint64_t)(first) << 16 | (uint64_t)(advance) << 8 | (uint64_t)(length))

#define ZEROS 0xF0 /* the symbol for 16 of them */

#define MAX_MCU_BYTES (10 * 64 * 31 / 8 + 8)
#define PADDING (2 * MAX_MCU_BYTES)

/* Where the k-th coefficient in zigzag order stands in a block. What a damaged file counts beyond the last goes to the
 * last, as in libjpeg: by two values of one entry, 32 at most. */
static const uint8_t PLACE[64 + 32] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* The value that `size` bits stand for: ITU-T T.81, F.2.2.1. */
static inline int32_t extended(uint32_t bits, unsigned int size)
{
    return bits < 1u << (size - 1) ? (int32_t)bits - (1 << size) + 1 : (int32_t)bits;
}

/* The entry for a code and the value behind it, 0 where the symbol has none. */
static uint64_t single(unsigned int symbol, unsigned int length, int32_t value, int is_dc)
{
    const unsigned int size = symbol & 15, run = is_dc ? 0 : symbol >> 4;
    if (length + size > HUFFMAN_LOOK || symbol == ZEROS)
        return ENTRY(length, OTHER + 1, 1, symbol, 0, 0);
    if (size == 0 && !is_dc)
        return ENTRY(length, END + 1, 1, 0, 0, 0);
    return ENTRY(length + size, run + 1, run + 1, 0, value, value);
}

/* libjpeg has checked the table: no more codes than there is room for, no DC symbol above 15. */
static void fill(HuffmanTable *table, const JpegHuffmanTable *from, int is_dc)
{
    for (size_t i = 0; i < sizeof table->look / sizeof *table->look; i++)
        table->look[i] = ENTRY(0, OTHER + 1, 1, 0, 0, 0);
    table->codes.symbols = from->huffval;
    uint32_t code = 0;
    int index = 0;
    for (unsigned int length = 1; length <= 16; length++, code <<= 1) {
        table->codes.shift[length] = index - (int32_t)code;
        for (int i = 0; i < from->bits[length]; i++, index++, code++) {
            if (length > HUFFMAN_LOOK)
                continue;
            const unsigned int symbol = from->huffval[index], size = symbol & 15, rest = HUFFMAN_LOOK - length;
            const unsigned int fits = size <= rest ? size : 0;
            uint64_t *entry = table->look + ((size_t)code << rest);
            for (uint32_t bits = 0; bits < 1u << fits; bits++) {
                const uint64_t same = single(symbol, length, fits ? extended(bits, fits) : 0, is_dc);
                for (uint32_t j = 0; j < 1u << (rest - fits); j++)
                    *entry++ = same;
            }
        }
        table->codes.limit[length] = code;
    }
}

/* Adds to each value what follows in its bits: the end of the block, or a second value. */
static void pair(HuffmanTable *table)
{
    const uint32_t all = (1 << HUFFMAN_LOOK) - 1;
    /* What follows may have been added to already: of that only the first value is taken, and its own length. */
    uint8_t lengths[1 << HUFFMAN_LOOK];
    for (uint32_t i = 0; i <= all; i++)
        lengths[i] = LENGTH(table->look[i]);
    for (uint32_t i = 0; i <= all; i++) {
        const uint64_t entry = table->look[i], next = table->look[i << lengths[i] & all];
        const unsigned int both = lengths[i] + lengths[i << lengths[i] & all], first = FIRST_ADVANCE(entry);
        if (ADVANCE(entry) >= END || ADVANCE(next) >= OTHER || both > HUFFMAN_LOOK)
            continue;
        if (!FIRST_VALUE(next))
            table->look[i] = ENTRY(both, END + first, first, 0, FIRST_VALUE(entry), FIRST_VALUE(entry));
        else
            table->look[i] = ENTRY(both, first + FIRST_ADVANCE(next), first, 0, FIRST_VALUE(entry), FIRST_VALUE(next));
    }
}

/* ---- the reader; macros, since all of it is to stay in registers ---- */

static inline uint64_t eight_bytes(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

#define REFILL() /* to 56 bits at least */ \
    do { \
        bits |= eight_bytes(next) >> count; \
        next += (63 - count) >> 3; \
        count |= 56; \
    } while (0)
#define DROP(n) (bits <<= (n), count -= (n))

/* The symbol of the code that comes, of `shortest` bits at least; it is dropped. Needs 16 bits. */
#define SYMBOL(symbol, codes, shortest) \
    do { \
        unsigned int length_ = (shortest); \
        while (length_ <= 16 && bits >> (64 - length_) >= (codes)->limit[length_]) \
            length_++; \
        if (length_ > 16) \
            huffman->fail(jpeg, "damaged"); \
        symbol = (codes)->symbols[((int32_t)(bits >> (64 - length_)) + (codes)->shift[length_]) & 0xFF]; \
        DROP(length_); \
    } while (0)

#define VALUE(value, size) /* Needs `size` bits, of which there is one at least. */ \
    do { \
        value = extended((uint32_t)(bits >> (64 - (size))), size); \
        DROP(size); \
    } while (0)

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("bmi2", "default"))) /* shifts that take their count from anywhere */
#endif
static int decode_mcu(Jpeg jpeg, JpegBlock **blocks)
{
    Huffman *huffman = jpeg->client_data;
    const uint8_t *next = huffman->next;
    uint64_t bits = huffman->bits;
    unsigned int count = huffman->count;
    for (int b = 0; b < jpeg->blocks_in_MCU; b++) {
        const int c = jpeg->MCU_membership[b];
        const JpegComponent *component = jpeg->cur_comp_info[c];
        int16_t *block = blocks ? *blocks[b] : huffman->scrap;
        int32_t value = 0;
        uint32_t symbol;

        const HuffmanTable *table = &huffman->dc[component->dc_tbl_no];
        REFILL();
        uint64_t entry = table->look[bits >> (64 - HUFFMAN_LOOK)];
        if (ADVANCE(entry) < OTHER) {
            value = FIRST_VALUE(entry);
            DROP(LENGTH(entry));
        } else {
            SYMBOL(symbol, &table->codes, 1);
            if (symbol)
                VALUE(value, symbol);
        }
        huffman->dc_value[c] += value;
        if (huffman->dc_value[c] < -(1 << 20) || huffman->dc_value[c] > 1 << 20)
            huffman->fail(jpeg, "damaged"); /* a sound file stays within 2^11 */
        block[0] = (int16_t)huffman->dc_value[c];

        table = &huffman->ac[component->ac_tbl_no];
        unsigned int k = 1;
        for (;;) {
            uint64_t covered = 0; /* sum of entries, for its lowest byte */
            REFILL();
            for (int left = 56 / HUFFMAN_LOOK; left; left--) {
                entry = table->look[bits >> (64 - HUFFMAN_LOOK)];
                const uint8_t *place = PLACE + k - 1;
                block[place[FIRST_ADVANCE(entry)]] = FIRST_VALUE(entry);
                block[place[ADVANCE(entry) & (END - 1)]] = SECOND_VALUE(entry);
                if (k + ADVANCE(entry) >= 64) {
                    count -= covered & 0xFF;
                    goto to_look_at;
                }
                k += ADVANCE(entry);
                bits <<= LENGTH(entry);
                covered += entry;
            }
            count -= covered & 0xFF;
            continue;
        to_look_at: /* The entry, which is not dropped yet: the block may end with it. */
            if (ADVANCE(entry) < OTHER && k - 1 + FIRST_ADVANCE(entry) < 63) {
                DROP(LENGTH(entry));
                break;
            }
            REFILL();
            if (ADVANCE(entry) < OTHER) { /* one by one near the end: what follows may be the next block's */
                SYMBOL(symbol, &table->codes, 1);
            } else if (LENGTH(entry)) {
                symbol = SYMBOL_IN(entry);
                DROP(LENGTH(entry));
            } else {
                SYMBOL(symbol, &table->codes, HUFFMAN_LOOK + 1);
            }
            const unsigned int size = symbol & 15;
            k += symbol >> 4;
            if (size) {
                VALUE(value, size);
                block[PLACE[k]] = (int16_t)value;
            } else if (symbol != ZEROS) {
                break;
            }
            if (++k >= 64)
                break;
        }
    }
    if ((size_t)(next - huffman->data) > huffman->length + count / 8)
        huffman->fail(jpeg, "the file ends too early");
    huffman->next = next;
    huffman->bits = bits;
    huffman->count = count;
    return 1;
}

/* Copies the scan that begins at `from` without stuffed bytes. Returns 0 if it does not end with the image. */
static int unstuff(Huffman *huffman, const uint8_t *from, size_t size)
{
    const uint8_t *end = from + size;
    uint8_t *to = huffman->data;
    for (;;) {
        const uint8_t *marker = memchr(from, 0xFF, end - from);
        if (!marker || marker + 1 == end)
            return 0;
        const int stuffed = marker[1] == 0;
        const size_t plain = marker - from + stuffed;
        memcpy(to, from, plain);
        to += plain;
        from = marker + 2;
        if (!stuffed) {
            huffman->length = to - huffman->data;
            memset(to, 0, PADDING);
            return marker[1] == MARKER_EOI;
        }
    }
}

/* Whether this libjpeg keeps its decoder where jpegint.h has it: both functions there are its own. */
static int is_the_known_layout(Jpeg jpeg)
{
    static volatile int known; /* every thread finds the same */
    if (!known) {
        Dl_info library, start, decode;
        known = jpeg->entropy && dladdr((void *)jpeg->src->resync_to_restart, &library) &&
                        dladdr((void *)jpeg->entropy->start_pass, &start) &&
                        dladdr((void *)jpeg->entropy->decode_mcu, &decode) &&
                        library.dli_fbase == start.dli_fbase && library.dli_fbase == decode.dli_fbase
                    ? 1
                    : -1;
    }
    return known == 1;
}

Huffman *huffman_take_over(Jpeg jpeg, void (*fail)(Jpeg, const char *))
{
    if (jpeg->progressive_mode || jpeg->arith_code || jpeg->restart_interval || jpeg->unread_marker ||
        jpeg->data_precision != 8 || jpeg->comps_in_scan != jpeg->num_components || !is_the_known_layout(jpeg))
        return NULL;
    for (int c = 0; c < jpeg->comps_in_scan; c++) {
        const unsigned int dc = jpeg->cur_comp_info[c]->dc_tbl_no, ac = jpeg->cur_comp_info[c]->ac_tbl_no;
        if (dc > 3 || ac > 3 || !jpeg->dc_huff_tbl_ptrs[dc] || !jpeg->ac_huff_tbl_ptrs[ac])
            return NULL;
    }
    Huffman *huffman = malloc(sizeof *huffman);
    if (!huffman)
        return NULL;
    huffman->data = malloc(jpeg->src->bytes_in_buffer + PADDING);
    if (!huffman->data || !unstuff(huffman, jpeg->src->next_input_byte, jpeg->src->bytes_in_buffer)) {
        huffman_release(huffman);
        return NULL;
    }
    int filled = 0; /* a bit a table */
    for (int c = 0; c < jpeg->comps_in_scan; c++) {
        const int dc = jpeg->cur_comp_info[c]->dc_tbl_no, ac = jpeg->cur_comp_info[c]->ac_tbl_no;
        if (!(filled & 1 << dc))
            fill(&huffman->dc[dc], jpeg->dc_huff_tbl_ptrs[dc], 1);
        if (!(filled & 16 << ac))
            fill(&huffman->ac[ac], jpeg->ac_huff_tbl_ptrs[ac], 0), pair(&huffman->ac[ac]);
        filled |= 1 << dc | 16 << ac;
    }
    huffman->next = huffman->data;
    huffman->bits = 0;
    huffman->count = 0;
    memset(huffman->dc_value, 0, sizeof huffman->dc_value);
    huffman->fail = fail;
    jpeg->client_data = huffman;
    jpeg->entropy->decode_mcu = decode_mcu;
    return huffman;
}

void huffman_release(Huffman *huffman)
{
    if (huffman)
        free(huffman->data);
    free(huffman);
}
