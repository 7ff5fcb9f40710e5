// The matrix product all kernels share: C[rows, lanes] (+)= A[rows, k] * B[k, lanes] in f32, a register tile at a time.
// A is broadcast one value at a time and B read in whole vectors, so A needs no transposition when its rows run
// along k (RS = its row stride, CS = 1) and none when they run along rows (RS = 1). Strides of A are compile-time
// constants: every broadcast is then one instruction with a fixed displacement.
#pragma once
#include "simd.h"

namespace kn::KN_ISA {

#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;   // 24 accumulators + 2 of B + 1 broadcast of 32 registers: 14 loads for 24 FMAs
constexpr int MR1 = 24;          // for a single vector of lanes
constexpr int REST = 8;          // rows of a tile after the last full one, then halves: 4 rows still fill the FMA units
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;    // 12 of 16 registers
constexpr int MR1 = 12;
constexpr int REST = 4;
#else
constexpr int MR = 6, NV = 2;
constexpr int MR1 = 12;
constexpr int REST = 4;
#endif
constexpr int LANES = NV * W;

template <int M, int N, int RS, int CS>
KN_INLINE void tile(int64_t k, const float* __restrict a, const float* __restrict b, int64_t ldb, float* __restrict c, int64_t ldc,
                    bool add_to) {
    vf acc[M][N];
    if (add_to) {
        KN_UNROLL for (int i = 0; i < M; ++i)
            KN_UNROLL for (int j = 0; j < N; ++j) acc[i][j] = load(c + i * ldc + j * W);
    } else {
        KN_UNROLL for (int i = 0; i < M; ++i)
            KN_UNROLL for (int j = 0; j < N; ++j) acc[i][j] = zero();
    }
    for (int64_t p = 0; p < k; ++p, a += CS, b += ldb) {
        vf bv[N];
        KN_UNROLL for (int j = 0; j < N; ++j) bv[j] = load(b + j * W);
        KN_UNROLL for (int i = 0; i < M; ++i) {
            vf av = set1(a[i * RS]);
            KN_UNROLL for (int j = 0; j < N; ++j) acc[i][j] = fma(av, bv[j], acc[i][j]);
        }
    }
    KN_UNROLL for (int i = 0; i < M; ++i)
        KN_UNROLL for (int j = 0; j < N; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

// The last rows of a block, fewer than a tile.
template <int M, int N, int RS, int CS>
static void tile_rest(int64_t rows, int64_t k, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc, bool add_to) {
    if constexpr (M > 0) {
        for (; rows >= M; rows -= M, a += M * RS, c += M * ldc) tile<M, N, RS, CS>(k, a, b, ldb, c, ldc, add_to);
        if (rows > 0) tile_rest<M / 2, N, RS, CS>(rows, k, a, b, ldb, c, ldc, add_to);
    }
}

// C[rows, vectors * W] (+)= A * B for any number of rows; `vectors` lanes vectors, each C and B row that wide.
template <int RS, int CS>
static void block(int64_t rows, int64_t vectors, int64_t k, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc,
                  bool add_to) {
    int64_t v = 0;
    for (; v + NV <= vectors; v += NV) {
        int64_t i = 0;
        for (; i + MR <= rows; i += MR) tile<MR, NV, RS, CS>(k, a + i * RS, b + v * W, ldb, c + i * ldc + v * W, ldc, add_to);
        if (i < rows) tile_rest<REST, NV, RS, CS>(rows - i, k, a + i * RS, b + v * W, ldb, c + i * ldc + v * W, ldc, add_to);
    }
    for (; v < vectors; ++v) {
        int64_t i = 0;
        for (; i + MR1 <= rows; i += MR1) tile<MR1, 1, RS, CS>(k, a + i * RS, b + v * W, ldb, c + i * ldc + v * W, ldc, add_to);
        if (i < rows) tile_rest<2 * REST, 1, RS, CS>(rows - i, k, a + i * RS, b + v * W, ldb, c + i * ldc + v * W, ldc, add_to);
    }
}

}  // namespace kn::KN_ISA
