#pragma once
#include "tensor.h"

namespace kn {
struct Fp8Quantize {
    TensorView x;             // f32 or bf16 [m, k]
    TensorView codes, scale;  // fp8 [m, k], f32 [m/block0, k/block1]
    int block0, block1;       // (1, 128), (128, 128) or (128, 1)
    bool pow2;
    float floor;
    int threads;
};
}  // namespace kn
