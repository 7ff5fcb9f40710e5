#include "mla_append_kv.h"

#include "kernels.h"
#include "parallel.h"
#include "quantize.h"

namespace kn::KN_ISA {

// bf16 values as f32, each already rounded.
KN_INLINE float round_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }

static void append(const MlaAppendKv& p, int64_t t, int64_t slot) {
    alignas(64) float latent[512], pe[64], rope[64];
    for (int64_t i = 0; i < 512; i += W) store(latent + i, load_bf16(p.kv_c.as<bf16>() + t * 512 + i));
    for (int64_t i = 0; i < 64; i += W) store(pe + i, load_bf16(p.k_pe.as<bf16>() + t * 64 + i));
    if (p.norm_weight) {
        alignas(64) float weight[512];
        load_values(p.norm_weight, 0, weight, 512);
        vf sum = zero();
        for (int64_t i = 0; i < 512; i += W) sum = fma(load(latent + i), load(latent + i), sum);
        const vf factor = set1(1.0f / sqrtf(hsum(sum) / 512.0f + p.eps));
        for (int64_t i = 0; i < 512; i += W) store(latent + i, mul(mul(load(latent + i), factor), load(weight + i)));
    }
    if (p.cos) {
        const float *cos = p.cos.as<float>() + t * 32, *sin = p.sin.as<float>() + t * 32;
        for (int64_t i = 0; i < 32; ++i) {
            const int64_t a = p.interleaved ? 2 * i : i, b = p.interleaved ? a + 1 : a + 32;
            rope[a] = pe[a] * cos[i] - pe[b] * sin[i];
            rope[b] = pe[a] * sin[i] + pe[b] * cos[i];
        }
    } else {
        std::memcpy(rope, pe, sizeof pe);
    }
    if (p.kv_cache.dtype == Dtype::bf16) {
        bf16* out = p.kv_cache.as<bf16>() + slot * 576;
        for (int64_t i = 0; i < 512; i += W) store_bf16(out + i, load(latent + i));
        for (int64_t i = 0; i < 64; i += W) store_bf16(out + 512 + i, load(rope + i));
        return;
    }
    fp8* out = p.kv_cache.as<fp8>() + slot * 656;
    float scale[4];
    bf16 tail[64];
    for (int64_t i = 0; i < 512; ++i) latent[i] = round_bf16(latent[i]);
    for (int64_t i = 0; i < 4; ++i) {
        scale[i] = block_scale(amax_finite(latent + i * 128, 128), p.pow2, 1e-4f);
        encode_fp8(latent + i * 128, scale[i], out + i * 128, 128);
    }
    for (int64_t i = 0; i < 64; i += W) store_bf16(tail + i, load(rope + i));
    std::memcpy(out + 512, scale, 16);
    std::memcpy(out + 528, tail, 128);
}

void mla_append_kv(const MlaAppendKv& p) {
    const int64_t t = p.kv_c.size[0], slots = p.kv_cache.size[0] * p.kv_cache.size[1];
    const int64_t* slot = p.slots.as<int64_t>();
    parallel(p.threads, [&](int index, int threads) {
        // A thread owns a range of slots, not of tokens: tokens that share a slot are written whole, in order.
        const Range r = share(slots, index, threads);
        for (int64_t i = 0; i < t; ++i)
            if (slot[i] >= r.begin && slot[i] < r.end) append(p, i, slot[i]);
    });
}

}  // namespace kn::KN_ISA
