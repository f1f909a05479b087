/* The entropy decoder of _jpeg_huffman.c, for _jpeg_region.c. */
#ifndef PRETRAIN_JPEG_HUFFMAN_H
#define PRETRAIN_JPEG_HUFFMAN_H

#include "_libjpeg.h"

enum { HUFFMAN_LOOK = 11 }; /* bits looked up at once */

typedef struct {
    const uint8_t *symbols;
    uint32_t limit[17]; /* one above the last code of a length */
    int32_t shift[17];  /* from a code of a length to its symbol's place */
} HuffmanCodes;

typedef struct {
    HuffmanCodes codes;
    uint64_t look[1 << HUFFMAN_LOOK];
} HuffmanTable;

typedef struct {
    HuffmanTable dc[4], ac[4];
    uint8_t *data;       /* the scan without stuffed bytes, zeros behind it */
    const uint8_t *next; /* of it, what is not yet in `bits` */
    size_t length;       /* without the zeros */
    uint64_t bits;       /* the next ones, from the top; what lies below the top `count` is right, too, or 0 */
    unsigned int count;
    int32_t dc_value[4];
    int16_t scrap[64]; /* where blocks go that nobody wants */
    void (*fail)(Jpeg, const char *); /* does not return */
} Huffman;

/* After jpeg_start_decompress: decode the scan's coefficients from here on. `fail` is called for damage, and must not
 * return. Returns NULL, with nothing changed, for a scan that is not of the common kind; to be freed by
 * huffman_release. */
Huffman *huffman_take_over(Jpeg jpeg, void (*fail)(Jpeg, const char *));
void huffman_release(Huffman *huffman);

#endif
