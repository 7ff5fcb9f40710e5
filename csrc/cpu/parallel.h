// parallel(threads, body): run body(index, threads) once on each of `threads` threads.
// OpenMP shares torch's own thread pool (one libgomp in the process). The ThreadSanitizer build runs on
// std::thread, because libgomp is not instrumented.
#pragma once
#include <cstdint>

#if defined(KN_STD_THREADS)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace kn::KN_ISA {

template <class Body> static inline void parallel(int threads, const Body& body) {
    if (threads <= 1) {
        body(0, 1);
        return;
    }
#if defined(KN_STD_THREADS)
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i) pool.emplace_back([&, i] { body(i, threads); });
    body(0, threads);
    for (auto& t : pool) t.join();
#else
#pragma omp parallel num_threads(threads)
    {
        body(omp_get_thread_num(), omp_get_num_threads());  // the runtime may grant fewer threads than asked for
    }
#endif
}

// The share of [0, n) of thread `index`: contiguous, in multiples of `step`.
struct Range {
    int64_t begin, end;
};
static inline Range share(int64_t n, int index, int threads, int64_t step = 1) {
    int64_t blocks = (n + step - 1) / step;
    int64_t lo = blocks * index / threads * step, hi = blocks * (index + 1) / threads * step;
    return {lo < n ? lo : n, hi < n ? hi : n};
}

// Work items handed out one by one; who does which changes no result.
struct Queue {
    int64_t next = 0;
    int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

}  // namespace kn::KN_ISA
