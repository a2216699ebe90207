// What the CPU's convolutions by Winograd's minimal filtering share: the walk over tiles and the transformations. The
// equations are in conv_winograd.cu.
#pragma once
#include "../include/conv.cuh"
#include "tiles.cuh"

namespace {

constexpr int kElements = 16;  // of a transformed tile

/// The tiles of an output image.
__forceinline__ int tiles_of(const ConvShape& s) { return (s.out_height + 1) / 2 * ((s.out_width + 1) / 2); }

/// The tiles of a batch, from one on: row by row, image by image.
struct TileWalk {
    int columns, rows;       // tiles of an image
    int image, row, column;  // the tile's image, and its first row and column of the output

    __forceinline__ TileWalk(const ConvShape& s, int number)
        : columns((s.out_width + 1) / 2), rows((s.out_height + 1) / 2), image(number / (rows * columns)),
          row(number / columns % rows * 2), column(number % columns * 2) {}

    __forceinline__ void next() {
        if ((column += 2) < 2 * columns) return;
        column = 0;
        if ((row += 2) < 2 * rows) return;
        row = 0, ++image;
    }
};

/// The output channels that a block computes: whole panels of `panel` channels, divided among the grid's rows.
struct OutputChannels {
    int first, count;

    __forceinline__ OutputChannels(int channels, int panel) {
        const int panels = channels / panel, group = int(blockIdx.y), groups = int(gridDim.y);
        const int begin = panels * group / groups, end = panels * (group + 1) / groups;
        first = begin * panel, count = (end - begin) * panel;
    }
};

/// B^T d of some columns of tiles.
template <class V, int COLUMNS>
__forceinline__ void transform_columns(V (&d)[4][COLUMNS]) {
    for (int j = 0; j < COLUMNS; ++j) {
        const V first = d[0][j] - d[2][j], last = d[1][j] - d[3][j], sum = d[1][j] + d[2][j];
        d[2][j] = d[2][j] - d[1][j];
        d[0][j] = first, d[1][j] = sum, d[3][j] = last;
    }
}

/// d B of a tile.
template <class V>
__forceinline__ void transform_rows(V (&d)[4][4]) {
    for (int i = 0; i < 4; ++i) {
        const V first = d[i][0] - d[i][2], last = d[i][1] - d[i][3], sum = d[i][1] + d[i][2];
        d[i][2] = d[i][2] - d[i][1];
        d[i][0] = first, d[i][1] = sum, d[i][3] = last;
    }
}

/// B^T d B of a tile of vectors.
template <class V>
__forceinline__ void transform_input(V (&d)[4][4]) {
    transform_columns(d);
    transform_rows(d);
}

/// One vector of a pixel's channels.
template <class S, class T>
__forceinline__ typename Vector<T>::type load_channels(const S* from) {
    if constexpr (Same<S, T>::value) {
        return load_vector(from);
    } else {
        T wide[Vector<T>::lanes];
        copy_widened(wide, from, Vector<T>::lanes);
        return load_vector(wide);
    }
}

/// Some neighbouring channels of an NHWC tensor.
template <class S>
struct Channels {
    const S* tensor;  // the first of these channels
    int height, width, pitch, count;
};

/// packed[element][kPanel] = G w G^T of one row of weights. From one element to the next are `pitch` numbers.
template <class T>
__forceinline__ void transform_weights(const T (&w)[9][kPanel<T>], T* packed, int64_t pitch) {
    using V = typename Vector<T>::type;
    constexpr int L = Vector<T>::lanes;
    const T half = T(0.5);
    for (int v = 0; v < kVectors; ++v, packed += L) {
        V rows[4][3];
        for (int b = 0; b < 3; ++b) {
            const V first = load_vector(w[b] + v * L), last = load_vector(w[6 + b] + v * L);
            const V sum = half * (first + last), middle = half * load_vector(w[3 + b] + v * L);
            rows[0][b] = first, rows[1][b] = sum + middle, rows[2][b] = sum - middle, rows[3][b] = last;
        }
        T* to = packed;
        for (int i = 0; i < 4; ++i, to += 4 * pitch) {
            const V sum = half * (rows[i][0] + rows[i][2]), middle = half * rows[i][1];
            store_vector(to, rows[i][0]);
            store_vector(to + pitch, sum + middle);
            store_vector(to + 2 * pitch, sum - middle);
            store_vector(to + 3 * pitch, rows[i][2]);
        }
    }
}

/// A^T m A for some output channels, written to the pixels of the tiles that are inside the output: `products` is
/// [element][tile][channel], with `plane` numbers between elements.
template <class S, class T>
__attribute__((noinline)) void finish_band(const T* products, TileWalk at, int tiles, int plane, const ConvShape& s,
                                           const OutputChannels& channels, S* y, bool accumulate) {
    using V = typename Vector<T>::type;
    constexpr int L = Vector<T>::lanes;
    const int O = s.out_channels;
    for (int tile = 0; tile < tiles; ++tile, at.next()) {
        const int64_t pixel = (int64_t(at.image) * s.out_height + at.row) * s.out_width + at.column;
        S* target = y + pixel * O + channels.first;
        const int high = s.out_height - at.row < 2 ? 1 : 2, wide = s.out_width - at.column < 2 ? 1 : 2;
        for (int channel = 0; channel < channels.count; channel += L, target += L, products += L) {
            V rows[2][4];
            for (int j = 0; j < 4; ++j) {
                V m[4];
                for (int i = 0; i < 4; ++i) m[i] = load_vector(products + (4 * i + j) * plane);
                const V sum = m[1] + m[2], difference = m[1] - m[2];
                rows[0][j] = m[0] + sum, rows[1][j] = difference - m[3];
            }
            for (int i = 0; i < high; ++i) {
                const V sum = rows[i][1] + rows[i][2], difference = rows[i][1] - rows[i][2];
                const V pixels[2] = {rows[i][0] + sum, difference - rows[i][3]};
                for (int j = 0; j < wide; ++j) {
                    S* to = target + (i * s.out_width + j) * O;
                    V result = pixels[j];
                    if (accumulate) result += load_channels<S, T>(to);
                    if constexpr (Same<S, T>::value) {
                        store_vector(to, result);
                    } else {
                        for (int lane = 0; lane < L; ++lane) to[lane] = convert_to<S>(result[lane]);
                    }
                }
            }
        }
    }
}

}  // namespace
