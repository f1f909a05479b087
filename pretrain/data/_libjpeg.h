/* libjpeg's ABI version 62, as far as this package uses it. Included by _jpeg_region.c and _jpeg_huffman.c.
 *
 * The declarations are taken from jpeglib.h and jpegint.h of libjpeg-turbo, Copyright (C) 1991-1998,
 * Thomas G. Lane; (C) 2009-2023, D. R. Commander (IJG and BSD licences). The library itself checks version and
 * structure size when a decompressor is created, and refuses another ABI.
 */
#ifndef PRETRAIN_LIBJPEG_H
#define PRETRAIN_LIBJPEG_H

#include <stddef.h>
#include <stdint.h>

#define LIBJPEG_VERSION 62
enum { JCS_GRAYSCALE = 1, JCS_RGB = 2, JCS_YCBCR = 3, JCS_EXT_RGBX = 7 };
#define MARKER_APP1 0xE1
#define MARKER_EOI 0xD9

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

typedef struct {
    uint8_t bits[17]; /* how many codes of each length; [0] is unused */
    uint8_t huffval[256];
    int sent_table;
} JpegHuffmanTable;

typedef struct {
    int component_index, component_id, h_samp_factor, v_samp_factor, quant_tbl_no, dc_tbl_no, ac_tbl_no;
    /* and more */
} JpegComponent;

typedef int16_t JpegBlock[64];

typedef struct {
    void (*start_pass)(Jpeg);
    int (*decode_mcu)(Jpeg, JpegBlock **); /* NULL: the blocks are not wanted */
    /* and more */
} JpegEntropyDecoder;

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
    void *quant_tbl_ptrs[4];
    const JpegHuffmanTable *dc_huff_tbl_ptrs[4], *ac_huff_tbl_ptrs[4];
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
    const JpegComponent *cur_comp_info[4];
    unsigned int MCUs_per_row, MCU_rows_in_scan;
    int blocks_in_MCU, MCU_membership[10], Ss, Se, Ah, Al, unread_marker;
    void *master, *main, *coef, *post, *inputctl, *marker;
    JpegEntropyDecoder *entropy;
    void *idct, *upsample, *cconvert, *cquantize;
};

#endif
