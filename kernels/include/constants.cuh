// Constants that kernels share with the Rust code that launches them. This file is their only definition: build.rs
// writes them as Rust constants (kMaxTerms becomes MAX_TERMS), and the C++ compilers check that both sides have the
// same values.
//
// Possible are `constexpr TYPE kName = EXPRESSION;`, `enum Name : uint32_t { kName = 0, ... };` and tables like those
// of tiles below.
#pragma once
#include <stdint.h>

namespace {

/// The most threads of a block.
constexpr uint32_t kBlockThreads = 256;
/// Bytes that one thread loads or stores at a time.
constexpr int kPackBytes = 16;

// ---- Vectors --------------------------------------------------------------------------------------------------------

/// The most vectors of one combination.
constexpr int kMaxTerms = 4;
/// The most sums of one reduction.
constexpr int kMaxSums = 3;
/// Numbers that the products of two combined vectors A and B consist of: A·A, A·B, B·B, ‖A‖, ‖B‖.
constexpr int kProducts = 5;

/// A vector of more bytes that is written without being read leaves the CPU's caches before it is read.
constexpr uint64_t kStreamBytes = 16777216;

// ---- Gradients ------------------------------------------------------------------------------------------------------

/// Elements that a block of `gradient_pieces` reads at a time, of one part or of several.
constexpr uint32_t kPieceElements = 1024;
/// The most elements that a block of `gather` copies at a time.
constexpr uint64_t kGatherElements = 8192;
/// The place of a piece that `gather` only reads.
constexpr uint64_t kGatherStays = 9223372036854775807;

// ---- Muon -----------------------------------------------------------------------------------------------------------

/// Rows and columns of a matrix that a block of `muon_momentum` takes.
constexpr uint32_t kMuonCopyTile = 64;
/// Rows and columns of a product that a block computes: on a GPU, and on the CPU.
constexpr uint32_t kMuonGpuTile = 64;
constexpr uint32_t kMuonCpuTile = 128;
/// On the CPU: rows of a register tile, and the depth that is packed at a time.
constexpr uint32_t kMuonStrip = 6;
constexpr uint32_t kMuonDepth = 256;
/// Elements that a block on the CPU packs and sums in its shared memory. The strips of a tile have 132 rows.
constexpr uint32_t kMuonWork = 132 * 256 + 128 * 256 + 132 * 128;

// ---- Batch normalisation --------------------------------------------------------------------------------------------

/// Rows over which a convolution on tensor cores sums moments: the rows of its tiles.
constexpr int kMomentRows = 128;

/// Where the backward takes the relu's mask from.
enum Mask : uint32_t {
    kMaskNone = 0,       // there is no relu
    kMaskOutput = 1,     // the forward's output
    kMaskRecompute = 2,  // the forward's input, normalised again
};

/// What happens to the gradient of the residual, which is dz.
enum Residual : uint32_t {
    kResidualNone = 0,        // there is no residual
    kResidualWrite = 1,       // it is written
    kResidualAccumulate = 2,  // it is added to the buffer
};

// ---- Other layers ---------------------------------------------------------------------------------------------------

/// Rows and columns of a linear layer's product that a block computes.
constexpr uint32_t kLinearTile = 32;
/// The most channels of an image in a data set.
constexpr int kMaxImageChannels = 4;
/// Steps between the quantiles of a distribution that `mix_batch` draws from.
constexpr uint32_t kQuantiles = 1024;

/// What a step of an augmentation policy does to an image of bytes.
enum PixelOperation : uint32_t {
    kPixelIdentity = 0,
    kPixelAffine = 1,        // shear, translation or rotation: reads the nearest pixel
    kPixelBrightness = 2,    // a blend with black
    kPixelColor = 3,         // a blend with its grey values
    kPixelContrast = 4,      // a blend with its mean grey value
    kPixelSharpness = 5,     // a blend with its smoothed form
    kPixelPosterize = 6,     // keeps the upper bits
    kPixelSolarize = 7,      // inverts values from a threshold on
    kPixelAutoContrast = 8,  // stretches each channel to the full range
    kPixelEqualize = 9,      // flattens the histogram of each channel
    kPixelInvert = 10,
};
/// Bytes of shared memory that `augment_batch` takes for the counts and the table of each channel's values.
constexpr int kAugmentTableBytes = 1280;
/// Bytes of shared memory that it takes for each row and each column of a resized crop: two weights and a position.
constexpr int kAugmentTapBytes = 12;

// ---- Attention ------------------------------------------------------------------------------------------------------

/// The most numbers of a head: a multiple of 32.
constexpr uint32_t kAttentionDepth = 64;
/// Rows, and columns, of a tile on a GPU and on the CPU. The CPU's sequences mostly fit into one tile.
constexpr uint32_t kAttentionTile = 32;
constexpr uint32_t kAttentionHostTile = 96;
/// Threads of a block on a GPU: each computes 4 x 4 numbers of a tile.
constexpr uint32_t kAttentionThreads = 64;
/// Elements that a row of a head takes in shared memory.
constexpr uint32_t kAttentionRow = 68;

// ---- Convolution ----------------------------------------------------------------------------------------------------

/// Elements by which a line of an operand in shared memory is longer than the tile, so that a transposed store does not
/// hit the same bank repeatedly.
constexpr int kConvLinePadding = 4;

/// The tiles of conv.cu, from the narrowest to the widest: rows, columns, depth of a step; rows and columns of one
/// thread.
#define POLDER_CONV_TILES(ROW) \
    ROW(16, 256, 16, 16, 4, 4) \
    ROW(32, 128, 32, 16, 4, 4) \
    ROW(64, 128, 64, 16, 8, 4) \
    ROW(128, 128, 128, 8, 8, 8)

/// Bytes of the depth of one row or column in one stage of conv_tensor.cu.
constexpr int kStageBytes = 64;
/// Columns of a weight gradient over which squares are summed together.
constexpr int kSquareColumns = 16;

/// The tiles of conv_tensor.cu, from the narrowest to the widest, all of kMomentRows rows: columns; rows and columns of
/// one warp; threads; stages. Of two with equally many columns the first is the default, and measurement may choose the
/// other.
#define POLDER_CONV_TENSOR_TILES(ROW) \
    ROW(16, 16, 32, 16, 128, 4)       \
    ROW(32, 32, 32, 32, 128, 4)       \
    ROW(64, 64, 64, 32, 128, 4)       \
    ROW(64_BY_8, 64, 32, 32, 256, 4)  \
    ROW(128, 128, 64, 64, 128, 3)

/// The tiles of conv_tensor.cu for factors that are sums of numbers of bf16, in the same form. Their fragments need
/// more registers, so no warp computes more than 64 x 32.
#define POLDER_CONV_SPLIT_TILES(ROW) \
    ROW(16, 16, 32, 16, 128, 4)      \
    ROW(32, 32, 32, 32, 128, 4)      \
    ROW(64, 64, 64, 32, 128, 4)      \
    ROW(128, 128, 64, 32, 256, 3)

/// The most channels of a transformed tile of Winograd's form whose rows follow one another. Those of more are one line
/// of a cache apart: an L1 cache has few places for multiples of a kilobyte.
constexpr int kDenseChannels = 128;
/// Bytes of the channels in one panel of the CPU's convolution: 16 floats, 8 doubles.
constexpr int kPanelBytes = 64;

}  // namespace
