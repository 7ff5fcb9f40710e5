#pragma once
#include "tensor.h"

namespace kn {
struct MlaDecode {
    TensorView q;            // bf16 [b, q, h, 576]
    TensorView kv_cache;     // bf16 [p, page, 576] or u8 [p, page, 656]
    TensorView block_table;  // i32 [b, n]
    TensorView seq_lens;     // i32 [b]
    TensorView sink;         // f32 [h] or absent
    TensorView out, lse;     // bf16 [b, q, h, 512], f32 [b, h, q]
    TensorView workspace;    // f32 [splits, b*q*h, 514], absent for one split
    float softmax_scale;
    bool causal;
    int threads;
};
struct MlaDecodeSparse {
    TensorView q, kv_cache;
    TensorView indices;  // i32 [b, q, top_k], flat token indices; out of range = no key
    TensorView sink, out, lse, workspace;
    float softmax_scale;
    int threads;
};
}  // namespace kn
