// The last stage of the gradients that no convolution finishes itself: sums of weight gradients in parts, and complete
// gradients. One launch takes all gradients of a network.
#include "include/elementwise.cuh"
#include "include/finish.cuh"
#include "include/reduce.cuh"
#include "include/ticket.cuh"

namespace {

/// A stretch of a gradient, which a block processes at a time.
struct GradientPiece {
    uint64_t parts, out;  // offsets of the gradient's parts and of the gradient from the pointers in the arguments
    uint64_t n;           // elements of the gradient, and of each part
    uint64_t splits;      // parts, one after the other; 0 if the gradient is complete
    uint64_t first;       // first element of the stretch
    uint64_t doublings;   // a block reads 2^doublings parts at a time; with fewer parts, the stretch is longer
};

template <class T>
struct GradientPiecesArgs {
    const T* parts;
    T* out;
    const GradientPiece* table;  // null for a single gradient in parts
    GradientPiece alone;
    uint64_t pieces;
    uint32_t accumulate;
    FinishArgs finish;
    double* norm;  // the root of all squares, by the last block; null if other stages follow
    const double* all_squares;
    uint64_t all_squares_count;
    uint32_t* ticket;
};

/// out[i] = partial[0][i] + partial[1][i] + ..., or added to out[i], in an order that depends only on the number of
/// parts. The result is finished if `finish` says so. Enough loads are pending to hide the latency of memory, both for
/// many short parts and for few long ones.
template <class T>
__device__ void gradient_pieces(const GradientPiecesArgs<T>& a) {
    constexpr uint32_t V = kPieceElements / kBlockThreads;
    POLDER_DYNAMIC_SHARED(T, shared);  // [parts at a time][elements of each]
    const uint32_t thread = threadIdx.x;
    const bool squared = a.finish.squares != nullptr;
    Finished<T> finished(a.finish);
    Sums<1> squares = {};
    for (uint64_t number = blockIdx.x; number < a.pieces; number += gridDim.x) {
        GradientPiece piece = a.alone;
        if (a.table != nullptr) piece = a.table[number];
        const uint32_t doublings = uint32_t(piece.doublings), at_once = 1u << doublings,
                       across = kBlockThreads >> doublings;
        if (a.table == nullptr) piece.first = number * (across * V);
        T* const out = a.out + piece.out;
        const T* const from = piece.splits > 0 ? a.parts + piece.parts : out;
        const auto write = [&](uint64_t i, T value) {
            if (i >= piece.n) return;
            if (a.accumulate != 0) value += out[i];
            value = finished.value(value);
            if (squared) squares.add({{double(value) * double(value)}});
            if (piece.splits > 0 || a.finish.scale != nullptr) out[i] = value;
        };
        const uint32_t column = thread & (across - 1), row = thread * at_once / kBlockThreads;
        T sums[V] = {};
#pragma unroll 4
        for (uint64_t split = row; split < max(piece.splits, uint64_t(1)); split += at_once) {
            POLDER_UNROLL
            for (uint32_t v = 0; v < V; ++v) {
                const uint64_t i = piece.first + column + v * across;
                if (i < piece.n) sums[v] += from[split * piece.n + i];
            }
        }
        if (at_once == 1) {
            POLDER_UNROLL
            for (uint32_t v = 0; v < V; ++v) write(piece.first + column + v * across, sums[v]);
            continue;
        }
        const uint32_t length = across * V;
        POLDER_UNROLL
        for (uint32_t v = 0; v < V; ++v) shared[row * length + column + v * across] = sums[v];
        __syncthreads();
        for (uint32_t i = thread; i < length; i += kBlockThreads) {
            T sum = shared[i];
            for (uint32_t part = 1; part < at_once; ++part) sum += shared[part * length + i];
            write(piece.first + i, sum);
        }
        __syncthreads();  // `shared` may be written again
    }
    finished.raise(a.finish);
    if (!squared) return;
    squares = block_sum(squares);
    if (thread == 0) a.finish.squares[blockIdx.x] = squares.v[0];
    if (a.norm == nullptr || !is_last_block(a.ticket, gridDim.x)) return;
    const Sums<1> all = sum_partials<1>(a.all_squares, unsigned(a.all_squares_count));
    if (thread == 0) a.norm[0] = sqrt(all.v[0]);
}

}  // namespace

POLDER_KERNEL(gradient_pieces_f32, gradient_pieces<float>, GradientPiecesArgs<float>)
POLDER_HOST_KERNEL(gradient_pieces_f64, gradient_pieces<double>, GradientPiecesArgs<double>)
