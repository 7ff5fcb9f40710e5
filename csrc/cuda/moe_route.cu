// moe_route: a warp a token, its choices in registers; no sort.
//
// 128 tokens of 256 experts are 132 KB: the time is that of a launch and of one token's chain, some 3000 cycles, half of them in
// top_k rounds of two reductions. So a warp is a block until there are more than eight a multiprocessor, and loops of unknown
// length are not unrolled, as a cold launch pays for its code.
//
// A choice is kept as an integer of the same order (`ordered`), so that redux.sync finds the largest of a warp, and the lowest
// expert that has it. Groups of any size pass through shared memory, where each is read by neighbouring lanes.
#include "kernels.h"
#include "reduce.cuh"
#include "values.cuh"

namespace kn::cuda {

static constexpr int OUT = int(0x80000000);  // below every choice: not to be chosen

// f32 as an integer of the same order, and back; NaN lies below -Inf.
__device__ __forceinline__ int ordered(float v) {
    const int bits = __float_as_int(v);
    return v == v ? bits ^ (bits >> 31 & 0x7fffffff) : OUT + 1;
}
__device__ __forceinline__ float choice_of(int key) { return __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }

__device__ __forceinline__ void load_four(const float* from, float* to) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_four(const bf16* from, float* to) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = low_bf16(v.x), to[1] = high_bf16(v.x), to[2] = low_bf16(v.y), to[3] = high_bf16(v.y);
}

// Place p of a lane holds this expert.
__device__ __forceinline__ int expert_at(int p, int lane) { return p / 4 * 128 + lane * 4 + p % 4; }

// A lane's P of e values, `rest` in places past e.
template <class T, int P> __device__ __forceinline__ void load_places(const T* from, int e, int lane, float rest, float (&v)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) v[p] = rest;
#pragma unroll
    for (int p = 0; p < P; p += 4) {
        const int i = expert_at(p, lane);
        if (e % 4 == 0) {
            if (i < e) load_four(from + i, v + p);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (i + c < e) v[p + c] = widen(__ldg(from + i + c));
        }
    }
}

struct Choose {
    int e, top_k, n_group, topk_group;
    int size, shift;  // experts of a group; log2 of the lanes that share one
    bool softmax, group_max, renormalize;
    float scaling;
};

// Puts every expert outside of the topk_group best groups OUT. `rank` has room for a key a group.
__device__ __forceinline__ void keep_best_groups(const Choose& c, int* key, int* rank, int lane) {
    const int lanes = 1 << c.shift, mine = lane & (lanes - 1), at_once = 32 >> c.shift;
    __syncwarp();
#pragma unroll 1
    for (int g = lane >> c.shift; g < c.n_group + (lane >> c.shift); g += at_once) {  // as many turns for every lane
        int best = OUT, second = OUT;
        if (g < c.n_group)
#pragma unroll 4
            for (int i = mine; i < c.size; i += lanes) {
                const int k = key[g * c.size + i];
                second = max(second, min(best, k));
                best = max(best, k);
            }
#pragma unroll 1
        for (int by = 1; by < lanes; by *= 2) {
            const int other = __shfl_xor_sync(0xffffffff, best, by), next = __shfl_xor_sync(0xffffffff, second, by);
            second = max(max(second, next), min(best, other));
            best = max(best, other);
        }
        const bool one = c.group_max || c.size == 1;
        if (g < c.n_group && mine == 0) rank[g] = one ? best : ordered(choice_of(best) + choice_of(second));
    }
    __syncwarp();
#pragma unroll 1
    for (int g = lane >> c.shift; g < c.n_group + (lane >> c.shift); g += at_once) {
        const int own = g < c.n_group ? rank[g] : OUT;
        int ahead = 0;
#pragma unroll 4
        for (int h = mine; h < c.n_group; h += lanes) ahead += rank[h] > own || (rank[h] == own && h < g);
#pragma unroll 1
        for (int by = 1; by < lanes; by *= 2) ahead += __shfl_xor_sync(0xffffffff, ahead, by);
        if (g < c.n_group && ahead >= c.topk_group)
#pragma unroll 4
            for (int i = mine; i < c.size; i += lanes) key[g * c.size + i] = OUT;
    }
    __syncwarp();
}

// Up to 32 P experts.
template <class T, int P>
__global__ void __launch_bounds__(128)
    route_tokens(const T* __restrict__ logits, const float* __restrict__ bias, float* __restrict__ weights,
                 int* __restrict__ experts, int64_t t, Choose c) {
    KN_SHARED(memory);
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int64_t token = int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
    if (token >= t) return;
    float* scores = reinterpret_cast<float*>(memory) + warp * 96 * P;
    int *keys = reinterpret_cast<int*>(scores + 32 * P), *chosen = keys + 32 * P;

    float v[P], shift[P];
    load_places(logits + token * c.e, c.e, lane, -__uint_as_float(0x7f800000), v);
    if (bias) load_places(bias, c.e, lane, 0.0f, shift);
    if (c.softmax) {
        float most = v[0], sum = 0;
#pragma unroll
        for (int p = 1; p < P; ++p) most = fmaxf(most, v[p]);
        most = lanes_max(most);
#pragma unroll
        for (int p = 0; p < P; ++p) {
            v[p] = expf(v[p] - most);
            sum += v[p];
        }
        sum = lanes_sum(sum);
#pragma unroll
        for (int p = 0; p < P; ++p) v[p] = __fdiv_rn(v[p], sum);
    } else {
#pragma unroll
        for (int p = 0; p < P; ++p) v[p] = reciprocal_fast(1.0f + expf(-v[p]));
    }
    int key[P];
    bool odd = false;
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const int i = expert_at(p, lane);
        const float choice = bias ? v[p] + shift[p] : v[p];
        odd |= i < c.e && choice != choice;
        key[p] = i < c.e ? ordered(choice) : OUT;
        scores[i] = v[p];
        keys[i] = key[p];
    }
    const int64_t at = token * c.top_k;
    if (__any_sync(0xffffffff, odd)) {
#pragma unroll 1
        for (int j = lane; j < c.top_k; j += 32) {
            experts[at + j] = j;
            weights[at + j] = __uint_as_float(0x7fc00000);
        }
        return;
    }
    if (c.topk_group < c.n_group) {
        keep_best_groups(c, keys, chosen, lane);
#pragma unroll
        for (int p = 0; p < P; ++p) key[p] = keys[expert_at(p, lane)];
    }
    __syncwarp();  // scores of all lanes are there, and ranks are no longer read

    int best, where;  // of this lane
    auto look = [&] {
        best = key[0], where = expert_at(0, lane);
#pragma unroll
        for (int p = 1; p < P; ++p)
            if (key[p] > best) best = key[p], where = expert_at(p, lane);
    };
    look();
    float sum = 0;
#pragma unroll 1
    for (int j = 0; j < c.top_k; ++j) {
        const int top = __reduce_max_sync(0xffffffff, best);
        const int expert = __reduce_min_sync(0xffffffff, best == top ? where : 0x7fffffff);
        if (where == expert) {
#pragma unroll
            for (int p = 0; p < P; ++p)
                if (expert_at(p, lane) == expert) key[p] = OUT;
            look();
        }
        if (lane == j % 32) {
            chosen[j] = expert;
            sum += scores[expert];
        }
    }
    sum = lanes_sum(sum) + 1e-20f;
#pragma unroll 1
    for (int j = lane; j < c.top_k; j += 32) {
        const float score = scores[chosen[j]];
        experts[at + j] = chosen[j];
        weights[at + j] = (c.renormalize ? __fdiv_rn(score, sum) : score) * c.scaling;
    }
}

template <class T, int P> static void route_by(const MoeRoute& p, const Choose& c, cudaStream_t stream) {
    const int64_t t = p.logits.size[0];
    const int warps = t > int64_t(units()) * 8 ? 4 : 1;
    const Grid grid{dim3(unsigned(ceil_div(t, warps))), 32 * warps, size_t(warps) * 96 * P * 4};
    launch<route_tokens<T, P>>("moe_route", grid, stream, p.logits.as<const T>(), p.bias.as<const float>(), p.weights.as<float>(),
                               p.experts.as<int>(), t, c);
}
template <class T> static void route_as(const MoeRoute& p, const Choose& c, cudaStream_t stream) {
    if (c.e <= 128) return route_by<T, 4>(p, c, stream);
    if (c.e <= 256) return route_by<T, 8>(p, c, stream);
    c.e <= 512 ? route_by<T, 16>(p, c, stream) : route_by<T, 32>(p, c, stream);
}

void moe_route(const MoeRoute& p, cudaStream_t stream) {
    Choose c{};
    c.e = int(p.logits.size[1]), c.top_k = int(p.weights.size[1]);
    c.n_group = p.n_group, c.topk_group = p.topk_group, c.size = c.e / p.n_group;
    while (c.n_group << (c.shift + 1) <= 32) ++c.shift;
    c.softmax = p.softmax, c.group_max = p.group_max, c.renormalize = p.renormalize, c.scaling = p.scaling;
    p.logits.dtype == Dtype::bf16 ? route_as<bf16>(p, c, stream) : route_as<float>(p, c, stream);
}

}  // namespace kn::cuda
