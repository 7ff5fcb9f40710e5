#pragma once
#include "tensor.h"

namespace kn {
struct MoeRoute {
    TensorView logits;            // f32 or bf16 [t, e]
    TensorView bias;              // f32 [e] or absent
    TensorView weights, experts;  // f32, i32 [t, top_k]
    TensorView workspace;         // 12 bytes an expert (rounded up to 16 experts), for min(t, 256) threads
    int n_group, topk_group;
    bool softmax, group_max, renormalize;
    float scaling;
    int threads;
};
}  // namespace kn
