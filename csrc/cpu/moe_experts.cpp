// The expert block in one call: each active expert's weights are read once for up to 256 of its tokens.
//
// Experts with few tokens are streamed: all their weight rows are work items of one parallel region a product, so
// that a decode step of one token runs at memory bandwidth with three barriers. Experts with more tokens take the
// panel path one after the other, all threads on one expert.
#include "moe_experts.h"

#include "gemm.h"
#include "kernels.h"
#include "moe.h"
#include "quantize.h"

namespace kn::KN_ISA {

constexpr int64_t ROWS = 128;  // weight rows of a work item

KN_INLINE Fp8Weights weights_of(const TensorView& w, const TensorView& scale, int64_t i, Fp8Weights*) {
    const int64_t n = w.size[1], k = w.size[2];
    return {w.as<fp8>() + i * n * k, scale.as<float>() + i * ceil_div(n, 128) * ceil_div(k, 128), n, k};
}
KN_INLINE Bf16Weights weights_of(const TensorView& w, const TensorView&, int64_t i, Bf16Weights*) {
    const int64_t n = w.size[1], k = w.size[2];
    return {w.as<bf16>() + i * n * k, n, k};
}

struct Carve {  // pieces of the workspace, each from a 64-byte boundary
    char* p;
    template <class T> T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(p);
        p += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
        return at;
    }
};

template <class Weights> static void experts(const MoeExperts& p) {
    const int64_t t = p.x.size[0], d = p.x.size[1], e = p.w13.size[0], n = p.w13.size[1] / 2, top_k = p.experts.size[1];
    const int64_t copies = t * top_k, few = min64(copies, STREAM_ROWS * e), many = min64(copies, MC);
    const bf16* x = p.x.as<bf16>();
    Weights* tag = nullptr;
    Carve space{p.workspace.as<char>()};
    int32_t* offsets = space.take<int32_t>(e + 1);
    int32_t* next = space.take<int32_t>(e);
    int32_t* row_of = space.take<int32_t>(copies);
    int32_t* token = space.take<int32_t>(copies);              // of each sorted row
    int32_t* small = space.take<int32_t>(e + 1);               // streamed experts, and their first rows in xs
    int32_t* small_row = space.take<int32_t>(e + 1);
    bf16* y = space.take<bf16>(copies * d);                    // second product, sorted rows
    bf16* h = space.take<bf16>(max64(few, many) * 2 * n);      // first product
    float* xs = space.take<float>(few * d);                    // f32 rows of streamed experts
    float* gs = space.take<float>(few * n);                    // their SwiGLU
    float* packed = space.take<float>(packed_floats(many, d));
    float* packed_g = space.take<float>(packed_floats(many, n));

    sort_copies(p.experts.as<int32_t>(), copies, e, offsets, row_of, next);
    for (int64_t i = 0; i < copies; ++i)
        if (row_of[i] >= 0) token[row_of[i]] = int32_t(i / top_k);
    int64_t smalls = 0, rows = 0;
    for (int64_t i = 0; i < e; ++i)
        if (const int64_t count = offsets[i + 1] - offsets[i]; count > 0 && count <= STREAM_ROWS) {
            small[smalls] = int32_t(i), small_row[smalls++] = int32_t(rows);
            rows += count;
        }
    small_row[smalls] = int32_t(rows);

    // f32 values of up to 128 columns of a token, and of a row of SwiGLU results
    auto input = [&](int64_t row, int64_t k0, int64_t kc, float* dst) {
        decode_bf16(x + token[row] * d + k0, dst, kc);
        if (p.fp8_activations) through_fp8(dst, kc);
    };
    auto hidden = [&](const bf16* row, int64_t k0, int64_t kc, float* dst) {
        swiglu(row + k0, row + n + k0, dst, kc);
        if (p.fp8_activations) through_fp8(dst, kc);
    };

    if (smalls) {
        Queue first, second, third, fourth;
        parallel(p.threads, [&](int, int) {
            for (int64_t i; (i = first.take()) < rows;) {
                int64_t s = 0;
                while (small_row[s + 1] <= i) ++s;
                for (int64_t q = 0; q < d; q += 128) input(offsets[small[s]] + i - small_row[s], q, min64(128, d - q), xs + i * d + q);
            }
        });
        const int64_t blocks13 = ceil_div(2 * n, ROWS), blocks2 = ceil_div(d, ROWS);
        parallel(p.threads, [&](int, int) {
            for (int64_t i; (i = second.take()) < smalls * blocks13;) {
                const int64_t s = i / blocks13, r0 = i % blocks13 * ROWS, m = small_row[s + 1] - small_row[s];
                bf16* out = h + small_row[s] * 2 * n;
                stream(m, weights_of(p.w13, p.w13_scale, small[s], tag), r0, min64(r0 + ROWS, 2 * n), xs + small_row[s] * d,
                       [&](int64_t row, const float* sums) {
                           for (int64_t j = 0; j < m; ++j) out[j * 2 * n + row] = float_to_bf16(sums[j]);
                       });
            }
        });
        parallel(p.threads, [&](int, int) {
            for (int64_t i; (i = third.take()) < rows;)
                for (int64_t q = 0; q < n; q += 128) hidden(h + i * 2 * n, q, min64(128, n - q), gs + i * n + q);
        });
        parallel(p.threads, [&](int, int) {
            for (int64_t i; (i = fourth.take()) < smalls * blocks2;) {
                const int64_t s = i / blocks2, r0 = i % blocks2 * ROWS, m = small_row[s + 1] - small_row[s];
                bf16* out = y + offsets[small[s]] * d;
                stream(m, weights_of(p.w2, p.w2_scale, small[s], tag), r0, min64(r0 + ROWS, d), gs + small_row[s] * n,
                       [&](int64_t row, const float* sums) {
                           for (int64_t j = 0; j < m; ++j) out[j * d + row] = float_to_bf16(sums[j]);
                       });
            }
        });
    }
    for (int64_t i = 0; i < e; ++i) {
        if (offsets[i + 1] - offsets[i] <= STREAM_ROWS) continue;
        for (int64_t r0 = offsets[i]; r0 < offsets[i + 1]; r0 += MC) {
            const int64_t m = min64(MC, offsets[i + 1] - r0);
            auto multiply = [&](const Weights& w, const float* lanes, bf16* out) {
                parallel(p.threads, [&](int index, int threads) {
                    const Range r = share(w.n, index, threads, MR);
                    panel(m, w, r.begin, r.end, lanes, panel_scratch, [&](int64_t row0, int64_t count, const float* sums, int64_t mm) {
                        store_transposed(out, Dtype::bf16, w.n, 0, mm, row0, count, sums, nullptr);
                    });
                });
            };
            parallel(p.threads, [&](int index, int threads) {
                const Range r = share(d, index, threads, 128);
                pack(m, d, r.begin, r.end, packed, [&](int64_t j, int64_t k0, int64_t kc, float* dst) { input(r0 + j, k0, kc, dst); });
            });
            multiply(weights_of(p.w13, p.w13_scale, i, tag), packed, h);
            parallel(p.threads, [&](int index, int threads) {
                const Range r = share(n, index, threads, 128);
                pack(m, n, r.begin, r.end, packed_g,
                     [&](int64_t j, int64_t k0, int64_t kc, float* dst) { hidden(h + j * 2 * n, k0, kc, dst); });
            });
            multiply(weights_of(p.w2, p.w2_scale, i, tag), packed_g, y + r0 * d);
        }
    }
    parallel(p.threads, [&](int index, int threads) {
        const Range r = share(t, index, threads);
        for (int64_t i = r.begin; i < r.end; ++i)
            combine_row(y, Dtype::bf16, d, row_of + i * top_k, p.weights.as<float>() + i * top_k, top_k, p.out.data, i);
    });
}

void moe_experts(const MoeExperts& p) { p.w13.dtype == Dtype::fp8 ? experts<Fp8Weights>(p) : experts<Bf16Weights>(p); }

}  // namespace kn::KN_ISA
