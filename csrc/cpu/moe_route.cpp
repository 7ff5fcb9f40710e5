#include "moe_route.h"

#include "kernels.h"
#include "parallel.h"
#include "quantize.h"

namespace kn::KN_ISA {

// Scores of a token: one exp for vector body and tail alike, so that equal logits tie. Lanes past e are not used.
KN_INLINE void score_row(float* v, int64_t e, bool softmax) {
    if (softmax) {
        float top = -__builtin_inff();
        for (int64_t i = 0; i < e; ++i) top = v[i] > top ? v[i] : top;
        double sum = 0;
        for (int64_t i = 0; i < e; i += W) store(v + i, exp1(sub(load(v + i), set1(top))));
        for (int64_t i = 0; i < e; ++i) sum += v[i];
        for (int64_t i = 0; i < e; i += W) store(v + i, div(load(v + i), set1(float(sum))));
        return;
    }
    for (int64_t i = 0; i < e; i += W) {
        const vf x = load(v + i), z = exp1(sub(zero(), abs1(x))), one = set1(1.0f);
        // 1 / (1 + exp(-x)), or exp(x) / (1 + exp(x)) for negative x: never an overflow
        alignas(64) float s[W], n[W], sign[W];
        store(s, div(one, add(one, z)));
        store(n, div(z, add(one, z)));
        store(sign, x);
        for (int j = 0; j < W; ++j) v[i + j] = sign[j] < 0 ? n[j] : s[j];
    }
}

static void route(const MoeRoute& p, int64_t t, float* score, float* choice, float* best) {
    const int64_t e = p.logits.size[1], top_k = p.weights.size[1], groups = p.n_group, size = groups ? e / groups : 0;
    float* weights = p.weights.as<float>() + t * top_k;
    int32_t* experts = p.experts.as<int32_t>() + t * top_k;
    load_values(p.logits, t * e, score, e);
    score_row(score, e, p.softmax);
    bool odd = false;
    for (int64_t i = 0; i < e; ++i) {
        choice[i] = p.bias ? score[i] + p.bias.as<float>()[i] : score[i];
        odd |= choice[i] != choice[i];
    }
    if (odd) {
        for (int64_t j = 0; j < top_k; ++j) weights[j] = bits_to_float(0x7FC00000), experts[j] = int32_t(j);
        return;
    }
    // best[g]: score of a group, then the largest choice left in it. at[g]: where that is, -1 for an excluded group.
    int32_t* at = reinterpret_cast<int32_t*>(best + groups);
    auto largest = [&](int64_t g) {
        int64_t where = -1;
        for (int64_t i = g * size; i < (g + 1) * size; ++i)
            if (choice[i] == choice[i] && (where < 0 || choice[i] > choice[where])) where = i;  // NaN: taken
        at[g] = int32_t(where);
        best[g] = where < 0 ? 0 : choice[where];
    };
    const bool all = p.topk_group >= groups;
    for (int64_t g = 0; g < groups && !all; ++g) {
        float first = -__builtin_inff(), second = -__builtin_inff();
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
            if (choice[i] > first)
                second = first, first = choice[i];
            else if (choice[i] > second)
                second = choice[i];
        }
        best[g] = p.group_max || size == 1 ? first : first + second;
        at[g] = -1;
    }
    for (int64_t j = 0; j < p.topk_group && !all; ++j) {
        int64_t chosen = -1;
        for (int64_t g = 0; g < groups; ++g)
            if (at[g] < 0 && (chosen < 0 || best[g] > best[chosen])) chosen = g;
        at[chosen] = 0;
    }
    for (int64_t g = 0; g < groups; ++g)
        if (all || at[g] == 0) largest(g);
    float sum = 0;
    for (int64_t j = 0; j < top_k; ++j) {
        int64_t g = -1;
        for (int64_t i = 0; i < groups; ++i)
            if (at[i] >= 0 && (g < 0 || best[i] > best[g])) g = i;
        const int64_t expert = at[g];
        experts[j] = int32_t(expert);
        weights[j] = score[expert];
        sum += score[expert];
        choice[expert] = bits_to_float(0x7FC00000);
        largest(g);
    }
    for (int64_t j = 0; j < top_k; ++j) weights[j] = (p.renormalize ? weights[j] / (sum + 1e-20f) : weights[j]) * p.scaling;
}

void moe_route(const MoeRoute& p) {
    const int64_t t = p.logits.size[0], padded = ceil_div(p.logits.size[1], 16) * 16;
    if (!t) return;
    parallel(int(min64(p.threads, min64(t, 256))), [&](int index, int threads) {
        float* mine = p.workspace.as<float>() + index * padded * 4;
        std::memset(mine, 0, size_t(padded) * 16);
        const Range r = share(t, index, threads);
        for (int64_t i = r.begin; i < r.end; ++i) route(p, i, mine, mine + padded, mine + 2 * padded);
    });
}

}  // namespace kn::KN_ISA
