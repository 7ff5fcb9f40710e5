#pragma once
#include "tensor.h"

namespace kn {
struct AttentionMerge {
    TensorView out_a, lse_a, out_b, lse_b;  // bf16 [..., q, h, d], f32 [..., h, q]
    TensorView out, lse;
    int threads;
};
}  // namespace kn
