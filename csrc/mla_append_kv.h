#pragma once
#include "tensor.h"

namespace kn {
struct MlaAppendKv {
    TensorView kv_c, k_pe;   // bf16 [t, 512], [t, 64]
    TensorView kv_cache;     // bf16 [p, page, 576] or u8 [p, page, 656]
    TensorView slots;        // i64 [t], -1 skips
    TensorView norm_weight;  // bf16 or f32 [512], or absent
    TensorView cos, sin;     // f32 [t, 32], or absent
    float eps;
    bool interleaved, pow2;
    int threads;
};
}  // namespace kn
