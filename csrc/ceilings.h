#pragma once
#include "tensor.h"

namespace kn {

// What a machine can do at most, measured by the bench: not ops. `sums` [threads] keeps the work from being optimised away.
struct CeilingFma {
    int64_t iterations;
    double* flops;  // [1] done, by all threads
    double* sums;
    int threads;
};
struct CeilingRead {
    TensorView buffer;  // f32 [n]
    double* sums;       // of each thread's share, zero before
    int threads;
};

}  // namespace kn
