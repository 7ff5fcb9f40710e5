#include "fp8_quantize.h"

#include "kernels.h"
#include "parallel.h"
#include "quantize.h"

namespace kn::KN_ISA {

// Blocks one row high: amax and codes of up to 128 values at a time.
static void quantize_rows(const Fp8Quantize& p, int64_t begin, int64_t end) {
    const int64_t k = p.x.size[1], kb = ceil_div(k, 128);
    alignas(64) float v[128];
    for (int64_t i = begin; i < end; ++i)
        for (int64_t q = 0; q < k; q += 128) {
            const int64_t n = min64(128, k - q);
            load_values(p.x, i * k + q, v, n);
            const float s = block_scale(amax_finite(v, n), p.pow2, p.floor);
            p.scale.as<float>()[i * kb + q / 128] = s;
            encode_fp8(v, s, p.codes.as<fp8>() + i * k + q, n);
        }
}

// Bands of 128 rows, blocks 128 or 1 column wide: two passes over a band that lies in L2.
static void quantize_bands(const Fp8Quantize& p, int64_t begin, int64_t end) {
    const int64_t m = p.x.size[0], k = p.x.size[1], kb = ceil_div(k, p.block1);
    alignas(64) float v[128], amax[128];
    for (int64_t band = begin; band < end; ++band)
        for (int64_t q = 0; q < k; q += 128) {
            const int64_t n = min64(128, k - q), i1 = min64(m, band * 128 + 128);
            for (int64_t j = 0; j < n; ++j) amax[j] = 0;
            for (int64_t i = band * 128; i < i1; ++i) {
                load_values(p.x, i * k + q, v, n);
                for (int64_t j = 0; j < n; j += W)
                    store_n(amax + j, max2(finite_abs(load_n(v + j, n - j)), load(amax + j)), n - j);
            }
            float* scale = p.scale.as<float>() + band * kb + q / p.block1;
            if (p.block1 == 1) {
                for (int64_t j = 0; j < n; ++j) scale[j] = amax[j] = block_scale(amax[j], p.pow2, p.floor);
            } else {
                float top = 0;
                for (int64_t j = 0; j < n; ++j) top = amax[j] > top ? amax[j] : top;
                scale[0] = block_scale(top, p.pow2, p.floor);
                for (int64_t j = 0; j < n; ++j) amax[j] = scale[0];
            }
            for (int64_t i = band * 128; i < i1; ++i) {
                load_values(p.x, i * k + q, v, n);
                encode_fp8_by(v, amax, p.codes.as<fp8>() + i * k + q, n);
            }
        }
}

void fp8_quantize(const Fp8Quantize& p) {
    const int64_t m = p.x.size[0];
    parallel(p.threads, [&](int index, int threads) {
        const Range r = share(p.block0 == 1 ? m : ceil_div(m, 128), index, threads);
        p.block0 == 1 ? quantize_rows(p, r.begin, r.end) : quantize_bands(p, r.begin, r.end);
    });
}

}  // namespace kn::KN_ISA
