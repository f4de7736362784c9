// AdamW over a range of parameters, in one pass through memory, by a pool of threads. Plain C ABI.
//
// The arithmetic is that of torch.optim.AdamW(fused=True) on a CPU, operation by operation: a fused
// multiply-add where torch has one (lerp, addcmul) and none elsewhere, so this is compiled with -ffp-contract=off.
// 28 bytes of memory traffic a parameter with a bf16 gradient and a bf16 result.

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32 = 0, BF16 = 1, FP16 = 2 };
enum { TILE = 1024, TILES_A_CHUNK = 32, CHUNK = TILE * TILES_A_CHUNK, LANES = 16 };

struct hyper {
    float scale;      // of the gradient
    float decay;      // 1 - lr * weight_decay
    float weight;     // 1 - beta1
    float beta2;
    float weight2;    // 1 - beta2
    float correction; // sqrt(1 - beta2^step)
    float eps;
    float step_size;  // -lr / (1 - beta1^step)
};

struct job {
    const float *p, *m, *v;
    float *new_p, *new_m, *new_v; // may be p, m, v
    const void *grad;
    void *out; // may be NULL
    int grad_type, out_type;
    long count;
    struct hyper h;
    double *squares; // one a chunk
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    pthread_t *threads;
    int num_threads, num_busy, stop;
    long generation;
    const struct job *job;
    atomic_long next;
};

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static void load_gradient(float *restrict tile, const void *grad, int type, long start, long count) {
    if (type == BF16) {
        const uint16_t *restrict g = (const uint16_t *)grad + start;
        for (long i = 0; i < count; i++) tile[i] = from_bits((uint32_t)g[i] << 16);
#ifdef __FLT16_MANT_DIG__
    } else if (type == FP16) {
        const _Float16 *restrict g = (const _Float16 *)grad + start;
        for (long i = 0; i < count; i++) tile[i] = (float)g[i];
#endif
    } else {
        memcpy(tile, (const float *)grad + start, (size_t)count * sizeof(float));
    }
}

static void store_result(const float *restrict p, void *out, int type, long start, long count) {
    if (type == BF16) {
        uint16_t *restrict o = (uint16_t *)out + start;
        for (long i = 0; i < count; i++) o[i] = to_bf16(p[i]);
#ifdef __FLT16_MANT_DIG__
    } else if (type == FP16) {
        _Float16 *restrict o = (_Float16 *)out + start;
        for (long i = 0; i < count; i++) o[i] = (_Float16)p[i];
#endif
    } else {
        memcpy((float *)out + start, p, (size_t)count * sizeof(float));
    }
}

static double sum_of_squares(const float *restrict tile, long count) {
    float lanes[LANES] = {0};
    long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += tile[i + j] * tile[i + j];
    double sum = 0;
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    for (long i = whole; i < count; i++) sum += (double)tile[i] * tile[i];
    return sum;
}

static void update(const struct job *job, float *restrict g, long start, long count) {
    const struct hyper h = job->h;
    const float *p = job->p + start, *m = job->m + start, *v = job->v + start;
    float *new_p = job->new_p + start, *new_m = job->new_m + start, *new_v = job->new_v + start;
    for (long i = 0; i < count; i++) g[i] *= h.scale;
    if (fabsf(h.weight) < 0.5f) {
#pragma GCC ivdep
        for (long i = 0; i < count; i++) new_m[i] = fmaf(h.weight, g[i] - m[i], m[i]);
    } else {
#pragma GCC ivdep
        for (long i = 0; i < count; i++) new_m[i] = fmaf(h.weight - 1.0f, g[i] - m[i], g[i]);
    }
#pragma GCC ivdep
    for (long i = 0; i < count; i++) {
        float second = fmaf(h.weight2 * g[i], g[i], v[i] * h.beta2);
        float denominator = sqrtf(second) / h.correction + h.eps;
        new_v[i] = second;
        new_p[i] = p[i] * h.decay + h.step_size * new_m[i] / denominator;
    }
}

static void run_chunks(struct pool *pool, const struct job *job) {
    float tile[TILE] __attribute__((aligned(64)));
    long num_chunks = (job->count + CHUNK - 1) / CHUNK;
    for (long chunk; (chunk = atomic_fetch_add(&pool->next, 1)) < num_chunks;) {
        long end = chunk * CHUNK + CHUNK < job->count ? chunk * CHUNK + CHUNK : job->count;
        double sum = 0;
        for (long start = chunk * CHUNK; start < end; start += TILE) {
            long count = end - start < TILE ? end - start : TILE;
            load_gradient(tile, job->grad, job->grad_type, start, count);
            sum += sum_of_squares(tile, count);
            update(job, tile, start, count);
            if (job->out) store_result(job->new_p + start, job->out, job->out_type, start, count);
        }
        job->squares[chunk] = sum;
    }
}

static void *serve(void *argument) {
    struct pool *pool = argument;
    long seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->generation == seen && !pool->stop) pthread_cond_wait(&pool->wake, &pool->lock);
        if (pool->stop) break;
        seen = pool->generation;
        const struct job *job = pool->job;
        pthread_mutex_unlock(&pool->lock);
        run_chunks(pool, job);
        pthread_mutex_lock(&pool->lock);
        if (--pool->num_busy == 0) pthread_cond_signal(&pool->idle);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

void tier_pool_close(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stop = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}

// Returns a pool of which the calling thread is one of num_threads, or NULL.
struct pool *tier_pool_open(int num_threads) {
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
    pool->threads = calloc((size_t)num_threads, sizeof *pool->threads);
    for (int i = 0; pool->threads && i < num_threads - 1; i++) {
        if (pthread_create(&pool->threads[i], NULL, serve, pool)) {
            tier_pool_close(pool);
            return NULL;
        }
        pool->num_threads++;
    }
    return pool;
}

// Updates and returns the sum of squares of the unscaled gradient, in an order that depends on the count alone.
// One call at a time; negative: out of memory.
double tier_adamw(struct pool *pool, const struct job *task) {
    struct job job = *task;
    long num_chunks = (job.count + CHUNK - 1) / CHUNK;
    job.squares = calloc((size_t)num_chunks + 1, sizeof *job.squares);
    if (!job.squares) return -1;
    pthread_mutex_lock(&pool->lock);
    pool->job = &job;
    atomic_store(&pool->next, 0);
    pool->num_busy = pool->num_threads;
    pool->generation++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    run_chunks(pool, &job);
    pthread_mutex_lock(&pool->lock);
    while (pool->num_busy) pthread_cond_wait(&pool->idle, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    double sum = 0;
    for (long i = 0; i < num_chunks; i++) sum += job.squares[i];
    free(job.squares);
    return sum;
}

int tier_has_fp16(void) {
#ifdef __FLT16_MANT_DIG__
    return 1;
#else
    return 0;
#endif
}
