#pragma once
#include "tensor.h"

namespace kn {
struct SwigluQuantize {
    TensorView x;             // bf16 [t, 2 n], gate then up
    TensorView codes, scale;  // fp8 [t, n], f32 [t, n/128]
    bool pow2;
    int threads;
};
}  // namespace kn
