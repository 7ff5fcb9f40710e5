// What the MoE kernels share: copies of tokens sorted by expert, and the weighted sum of a token's rows.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace kn::KN_ISA {

// Stable counting sort of copies by expert: offsets[e + 1] of the experts' rows and the row of each copy, -1 for id -1.
KN_INLINE void sort_copies(const int32_t* experts, int64_t copies, int64_t e, int32_t* offsets, int32_t* row_of, int32_t* next) {
    for (int64_t i = 0; i <= e; ++i) offsets[i] = 0;
    for (int64_t i = 0; i < copies; ++i)
        if (experts[i] >= 0) ++offsets[experts[i] + 1];
    for (int64_t i = 0; i < e; ++i) next[i] = offsets[i], offsets[i + 1] += offsets[i];
    for (int64_t i = 0; i < copies; ++i) row_of[i] = experts[i] >= 0 ? next[experts[i]]++ : -1;
}

// out[i] = sum over slots j of weights[j] * y[row_of[j]], in f32 and in that order.
KN_INLINE void combine_row(const void* y, Dtype dtype, int64_t d, const int32_t* row_of, const float* weights, int64_t top_k, void* out,
                           int64_t i) {
    for (int64_t q = 0; q < d; q += W) {
        const int64_t n = d - q;
        vf sum = zero();
        for (int64_t j = 0; j < top_k; ++j) {
            if (row_of[j] < 0) continue;
            const int64_t at = row_of[j] * d + q;
            const vf v = dtype == Dtype::bf16 ? load_bf16_n(static_cast<const bf16*>(y) + at, n) : load_n(static_cast<const float*>(y) + at, n);
            sum = weights ? fma(v, set1(weights[j]), sum) : add(sum, v);
        }
        store_out(out, dtype, i * d + q, sum, n);
    }
}

}  // namespace kn::KN_ISA
