// The arithmetic of adamw.c on a CUDA device, to the bit: every operation rounds to nearest by itself, and the
// fused multiply-adds are those that torch has on a CPU. Plain C ABI.

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

enum { FP32 = 0, BF16 = 1, FP16 = 2 };

struct hyper {
    float scale, decay, weight, beta2, weight2, correction, eps, step_size;
};

struct job {
    const float *p, *m, *v;
    float *new_p, *new_m, *new_v; // may be p, m, v
    const void *grad;
    void *out; // may be null
    int grad_type, out_type;
    long count;
    struct hyper h;
    double *squares; // unused here
};

template <int TYPE> __device__ float load(const void *data, long i) {
    if (TYPE == BF16) return __uint_as_float((uint32_t)((const uint16_t *)data)[i] << 16);
    if (TYPE == FP16) return __half2float(((const __half *)data)[i]);
    return ((const float *)data)[i];
}

template <int TYPE> __device__ void store(void *data, long i, float value) {
    if (TYPE == BF16) {
        uint32_t bits = __float_as_uint(value);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        ((uint16_t *)data)[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    } else if (TYPE == FP16) {
        ((__half *)data)[i] = __float2half_rn(value);
    } else {
        ((float *)data)[i] = value;
    }
}

template <int GRAD, int OUT> __global__ void __launch_bounds__(256) adamw(struct job job) {
    const struct hyper h = job.h;
    const bool near = fabsf(h.weight) < 0.5f;
    for (long i = blockIdx.x * 256L + threadIdx.x; i < job.count; i += gridDim.x * 256L) {
        float g = __fmul_rn(load<GRAD>(job.grad, i), h.scale), m = job.m[i];
        float coefficient = near ? h.weight : __fsub_rn(h.weight, 1.0f);
        m = __fmaf_rn(coefficient, __fsub_rn(g, m), near ? m : g);
        float v = __fmaf_rn(__fmul_rn(h.weight2, g), g, __fmul_rn(job.v[i], h.beta2));
        float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), h.correction), h.eps);
        float p = __fadd_rn(__fmul_rn(job.p[i], h.decay), __fdiv_rn(__fmul_rn(h.step_size, m), denominator));
        job.new_p[i] = p;
        job.new_m[i] = m;
        job.new_v[i] = v;
        if (job.out) store<OUT>(job.out, i, p);
    }
}

template <int GRAD> static void launch(const struct job *job, int blocks, cudaStream_t stream) {
    if (job->out_type == BF16) adamw<GRAD, BF16><<<blocks, 256, 0, stream>>>(*job);
    else if (job->out_type == FP16) adamw<GRAD, FP16><<<blocks, 256, 0, stream>>>(*job);
    else adamw<GRAD, FP32><<<blocks, 256, 0, stream>>>(*job);
}

// Enqueues the update on the stream; returns CUDA's error code.
extern "C" int tier_adamw_cuda(const struct job *job, void *stream) {
    long wanted = (job->count + 1023) / 1024;
    int blocks = (int)(wanted < 2048 ? wanted : 2048);
    if (!blocks) return 0;
    cudaStream_t on = (cudaStream_t)stream;
    if (job->grad_type == BF16) launch<BF16>(job, blocks, on);
    else if (job->grad_type == FP16) launch<FP16>(job, blocks, on);
    else launch<FP32>(job, blocks, on);
    return (int)cudaGetLastError();
}
