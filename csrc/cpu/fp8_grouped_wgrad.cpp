// dw[n, k] = sum over the rows t of a group of dy[t, n] * x[t, k]: dy is broadcast, x lies in lanes, as they are stored.
#include "fp8_grouped_wgrad.h"

#include "gemm.h"
#include "kernels.h"

namespace kn::KN_ISA {

constexpr int64_t TC = 64;   // rows at a time: x 68 KB and dy 28 KB of L2
constexpr int64_t LDY = 112;
static thread_local struct {
    alignas(64) float dy[TC * LDY];
    alignas(64) float x[TC * LDC];
    alignas(64) float dw[NC * LDC];
} scratch;

// f32 values of `count` columns of one row, with a scale for each column.
KN_INLINE void decode_columns(const fp8* src, const float* scale, float* dst, int64_t count) {
    decode_fp8(src, 1.0f, dst, count);
    for (int64_t j = 0; j < count; j += W) store_n(dst + j, mul(load_n(dst + j, count - j), load_n(scale + j, count - j)), count - j);
}

void fp8_grouped_wgrad(const Fp8GroupedWgrad& p) {
    const int64_t n = p.dy.size[1], k = p.x.size[1], e = p.dw.size[0], nb = ceil_div(n, NC), kb = ceil_div(k, MC);
    const int32_t* offsets = p.offsets.as<int32_t>();
    Queue queue;
    parallel(p.threads, [&](int, int) {
        auto& s = scratch;
        for (int64_t item; (item = queue.take()) < e * nb * kb;) {
            const int64_t i = item / (nb * kb), n0 = item / kb % nb * NC, k0 = item % kb * MC;
            const int64_t rows = min64(NC, n - n0), columns = min64(MC, k - k0);
            std::memset(s.dw, 0, sizeof s.dw);
            for (int64_t t0 = offsets[i]; t0 < offsets[i + 1]; t0 += TC) {
                const int64_t count = min64(TC, offsets[i + 1] - t0);
                for (int64_t t = 0; t < count; ++t) {
                    const int64_t row = t0 + t, block = row / 128;  // scale blocks count from the start of the tensor
                    decode_columns(p.dy.as<fp8>() + row * n + n0, p.dy_scale.as<float>() + block * n + n0, s.dy + t * LDY, rows);
                    decode_columns(p.x.as<fp8>() + row * k + k0, p.x_scale.as<float>() + block * k + k0, s.x + t * LDC, columns);
                }
                KN_ISA::block<1, LDY>(rows, ceil_div(columns, W), count, s.dy, s.x, LDC, s.dw, LDC, true);
            }
            for (int64_t r = 0; r < rows; ++r)
                std::memcpy(p.dw.as<float>() + ((i * n) + n0 + r) * k + k0, s.dw + r * LDC, size_t(columns) * 4);
        }
    });
}

}  // namespace kn::KN_ISA
