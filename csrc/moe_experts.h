#pragma once
#include "tensor.h"

namespace kn {
struct MoeExperts {
    TensorView x;                     // bf16 [t, d]
    TensorView w13, w13_scale;        // fp8 [e, 2 n, d], f32 [e, 2n/128, d/128]; or bf16 without scales
    TensorView w2, w2_scale;          // fp8 [e, d, n], f32 [e, d/128, n/128]
    TensorView weights, experts;      // f32, i32 [t, top_k]
    TensorView out;                   // bf16 [t, d]
    TensorView workspace;             // see ops/moe_experts.py
    bool fp8_activations;
    int threads;
};
}  // namespace kn
