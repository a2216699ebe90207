/* What must be answered with a status: NULL, wrong values, callbacks that fail or call back, states that do not fit,
 * two threads at once. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "polder.h"

enum { N = 1000 };

static void expect_at(int line, polder_status found, polder_status expected, const char *words) {
    const char *text = polder_last_error();
    if (found == expected && (expected == POLDER_STATUS_OK || (strstr(text, words) != NULL && !strchr(text, '\n'))))
        return;
    fprintf(stderr, "line %d: status %d, expected %d: %s\n", line, (int)found, (int)expected, text);
    exit(1);
}
#define EXPECT(call, status, words) expect_at(__LINE__, (call), POLDER_STATUS_##status, (words))
#define OK(call) expect_at(__LINE__, (call), POLDER_STATUS_OK, "")

static void hold_at(int line, int holds) {
    if (holds) return;
    fprintf(stderr, "line %d: not so\n", line);
    exit(1);
}
#define HOLDS(condition) hold_at(__LINE__, (condition))

static polder_device *cpu;
static polder_optimizer *own;

/* 1/2 |w|^2, unless the context asks for something else. */
struct wish {
    int32_t fail;
    int call_back;
    double bad;
    polder_status answered;
};

static int32_t gradient(void *context, const void *weights, void *gradient, double *loss, int32_t updates_statistics);
static const polder_objective plain = {sizeof(polder_objective), NULL, gradient, NULL, 0};

static int32_t gradient(void *context, const void *weights, void *gradient, double *loss, int32_t updates_statistics) {
    struct wish *wish = context;
    const float *w = weights;
    float *g = gradient;
    (void)updates_statistics;
    *loss = 0;
    for (size_t k = 0; k < N; ++k) {
        g[k] = w[k];
        *loss += 0.5 * w[k] * w[k];
    }
    if (wish == NULL) return 0;
    *loss += wish->bad;
    if (wish->call_back) {
        float others[N] = {0};
        wish->answered = polder_optimizer_step(own, &plain, others, 0.1);
    }
    return wish->fail;
}

static void *use_one(void *finished) {
    float weights[N];
    for (size_t k = 0; k < N; ++k) weights[k] = 1.0f;
    /* Whoever finds the optimizer in use tries again. */
    while (*(int *)finished < 500) {
        const polder_status status = polder_optimizer_step(own, &plain, weights, 0.001);
        if (status == POLDER_STATUS_OK) ++*(int *)finished;
        if (status != POLDER_STATUS_OK && status != POLDER_STATUS_BUSY) EXPECT(status, OK, "");
    }
    return NULL;
}

static void *use_own(void *result) {
    polder_device *device;
    polder_optimizer *optimizer;
    float weights[N];
    for (size_t k = 0; k < N; ++k) weights[k] = 1.0f;
    OK(polder_device_cpu(1, &device));
    OK(polder_optimizer_new(device, POLDER_TYPE_F32, N, "cr-sam", "rho=0.05", &optimizer));
    for (int step = 0; step < 200; ++step) OK(polder_optimizer_step(optimizer, &plain, weights, 0.01));
    polder_optimizer_free(optimizer);
    polder_device_free(device);
    *(float *)result = weights[7];
    return NULL;
}

static void nulls_and_values(float *weights) {
    polder_optimizer *optimizer = NULL;
    double number = 0;
    char unaligned[16] = {0};
    EXPECT(polder_device_cpu(1, NULL), ARGUMENT, "`device` is NULL");
    EXPECT(polder_device_cpu(1u << 30, &cpu), ARGUMENT, "threads");
    EXPECT(polder_device_synchronize(NULL), ARGUMENT, "`device` is NULL");
    EXPECT(polder_norm(NULL, POLDER_TYPE_F32, N, weights, &number), ARGUMENT, "`device` is NULL");
    EXPECT(polder_norm(cpu, POLDER_TYPE_F32, N, NULL, &number), ARGUMENT, "`x` is NULL");
    EXPECT(polder_norm(cpu, POLDER_TYPE_F32, N, weights, NULL), ARGUMENT, "`norm` is NULL");
    EXPECT(polder_norm(cpu, 7, N, weights, &number), ARGUMENT, "type 7");
    EXPECT(polder_norm(cpu, POLDER_TYPE_F32, 1, unaligned + 1, &number), ARGUMENT, "not aligned");
    EXPECT(polder_norm(cpu, POLDER_TYPE_F32, (size_t)-1, weights, &number), ARGUMENT, "too long");
    OK(polder_norm(cpu, POLDER_TYPE_F32, 0, NULL, &number));
    HOLDS(number == 0);
    EXPECT(polder_sgd(cpu, POLDER_TYPE_F32, N, weights, weights, NULL, 1, &number, 0.1, 0.9, 0, 0, NULL), ARGUMENT,
           "`gradients` is NULL");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, NULL, NULL, &optimizer), ARGUMENT, "`method` is NULL");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sammy", NULL, &optimizer), ARGUMENT, "expected one of");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", NULL, NULL), ARGUMENT, "`optimizer` is NULL");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "rho", &optimizer), ARGUMENT, "name=value");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "rho=-1", &optimizer), ARGUMENT, "0 or more");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "rho=x", &optimizer), ARGUMENT, "rho: x");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "alpha=1", &optimizer), ARGUMENT, "unknown option");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sgd", "base=adamw", &optimizer), ARGUMENT, "no meaning");
    EXPECT(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "\xff=1", &optimizer), ARGUMENT, "UTF-8");
    EXPECT(polder_optimizer_new(cpu, 2, N, "sam", NULL, &optimizer), ARGUMENT, "type 2");
    HOLDS(optimizer == NULL);
    HOLDS(polder_method_name(polder_method_count()) == NULL && strcmp(polder_version(), "0.1.0") == 0);
    polder_optimizer_free(NULL);
    polder_device_free(NULL);
}

static void objectives(float *weights) {
    struct wish wish = {0, 0, 0, POLDER_STATUS_OK};
    polder_objective objective = {sizeof objective, &wish, gradient, NULL, 0};
    polder_objective other = {1, &wish, gradient, NULL, 0};
    float before[N];
    double number;
    OK(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "rho=0.1 momentum=0", &own));
    memcpy(before, weights, sizeof before);
    EXPECT(polder_optimizer_step(NULL, &objective, weights, 0.1), ARGUMENT, "`optimizer` is NULL");
    EXPECT(polder_optimizer_step(own, NULL, weights, 0.1), ARGUMENT, "`objective` is NULL");
    EXPECT(polder_optimizer_step(own, &objective, NULL, 0.1), ARGUMENT, "`weights` is NULL");
    EXPECT(polder_optimizer_step(own, &objective, weights, NAN), ARGUMENT, "`lr`");
    EXPECT(polder_optimizer_step(own, &other, weights, 0.1), ARGUMENT, "size 1");
    other.size = sizeof other;
    other.gradient = NULL;
    EXPECT(polder_optimizer_step(own, &other, weights, 0.1), ARGUMENT, "gradient");
    wish.fail = 77;
    EXPECT(polder_optimizer_step(own, &objective, weights, 0.1), CALLBACK, "gradient returned 77");
    EXPECT(polder_curvature_gradient_norm(cpu, POLDER_TYPE_F32, &objective, weights, N, &number), CALLBACK, "77");
    wish.fail = 0;
    wish.bad = INFINITY;
    OK(polder_optimizer_step(own, &objective, weights, 0.1));
    OK(polder_optimizer_get(own, "skipped", &number));
    HOLDS(number == 1);
    EXPECT(polder_curvature_gradient_norm(cpu, POLDER_TYPE_F32, &objective, weights, N, &number), NOT_FINITE, "finite");
    wish.bad = 0;
    HOLDS(memcmp(before, weights, sizeof before) == 0);
    EXPECT(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 2, 1, &number, &number), ARGUMENT,
           "no exact product");
    EXPECT(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 0, 1, &number, &number), ARGUMENT, "");
    objective.difference_step = NAN;
    EXPECT(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 2, 1, &number, &number), ARGUMENT,
           "a step of NaN");
    objective.difference_step = -1;
    EXPECT(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 2, 1, &number, &number), ARGUMENT,
           "above 0");
    objective.difference_step = 0.1;
    wish.fail = 5;
    EXPECT(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 2, 1, &number, &number), CALLBACK, "5");
    wish.fail = 0;
    OK(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 2, 1, &number, &number));
    wish.call_back = 1;
    OK(polder_optimizer_step(own, &objective, weights, 0.1));
    HOLDS(wish.answered == POLDER_STATUS_BUSY);
    EXPECT(polder_optimizer_get(own, "eta", &number), ARGUMENT, "no number eta");
    EXPECT(polder_optimizer_scale_rho(own, -1), ARGUMENT, "`factor`");
    OK(polder_optimizer_scale_rho(own, 0.5));
    HOLDS(memcmp(before, weights, sizeof before) != 0);
}

static void states(void) {
    polder_optimizer *other = NULL;
    unsigned char state[8192], before[8192], changed[8192];
    size_t bytes, others;
    OK(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, "sam", "rho=0.1", &other));
    OK(polder_optimizer_state_size(own, &bytes));
    HOLDS(bytes < sizeof state);
    OK(polder_optimizer_state_get(own, before, bytes));
    OK(polder_optimizer_state_get(other, state, bytes));
    HOLDS(memcmp(before, state, bytes) != 0);
    EXPECT(polder_optimizer_state_size(NULL, &bytes), ARGUMENT, "`optimizer` is NULL");
    EXPECT(polder_optimizer_state_size(own, NULL), ARGUMENT, "`bytes` is NULL");
    EXPECT(polder_optimizer_state_get(NULL, state, bytes), ARGUMENT, "`optimizer` is NULL");
    EXPECT(polder_optimizer_state_get(own, NULL, bytes), ARGUMENT, "`state` is NULL");
    EXPECT(polder_optimizer_state_get(own, state, bytes - 1), ARGUMENT, "`bytes`");
    EXPECT(polder_optimizer_state_get(own, state, bytes + 1), ARGUMENT, "`bytes`");
    EXPECT(polder_optimizer_state_set(NULL, state, bytes), ARGUMENT, "`optimizer` is NULL");
    EXPECT(polder_optimizer_state_set(own, NULL, bytes), ARGUMENT, "`state` is NULL");
    EXPECT(polder_optimizer_state_set(own, state, (size_t)-1), ARGUMENT, "`bytes`");
    EXPECT(polder_optimizer_state_set(own, "something else", 15), ARGUMENT, "not the state of an optimizer");
    for (size_t length = 8; length < bytes; length += 7) {
        /* In memory of their own, so that reading beyond their end is noticed. */
        unsigned char *part = malloc(length);
        HOLDS(part != NULL);
        memcpy(part, state, length);
        EXPECT(polder_optimizer_state_set(own, part, length), ARGUMENT, "bytes, expected");
        free(part);
        memcpy(changed, state, bytes);
        changed[length] ^= 4;
        EXPECT(polder_optimizer_state_set(own, changed, bytes), ARGUMENT, "`state`: ");
    }
    polder_optimizer_free(other);
    const struct {
        int32_t type;
        size_t length;
        const char *method, *options, *words;
    } cases[] = {{POLDER_TYPE_F32, N, "cr-sam", NULL, "the method cr-sam, the optimizer has sam"},
                 {POLDER_TYPE_F32, N, "sam", "base=adamw", "the base adamw, the optimizer has sgd"},
                 {POLDER_TYPE_F64, N / 2, "sam", NULL, "the type f64, the optimizer has f32"},
                 {POLDER_TYPE_F32, N - 1, "sam", NULL, "the number of weights 999, the optimizer has 1000"}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; ++k) {
        OK(polder_optimizer_new(cpu, cases[k].type, cases[k].length, cases[k].method, cases[k].options, &other));
        OK(polder_optimizer_state_size(other, &others));
        HOLDS(others <= sizeof changed);
        OK(polder_optimizer_state_get(other, changed, others));
        EXPECT(polder_optimizer_state_set(own, changed, others), ARGUMENT, cases[k].words);
        polder_optimizer_free(other);
    }
    OK(polder_optimizer_state_get(own, changed, bytes));
    HOLDS(memcmp(before, changed, bytes) == 0);
    OK(polder_optimizer_state_set(own, state, bytes));
    OK(polder_optimizer_state_get(own, changed, bytes));
    HOLDS(memcmp(state, changed, bytes) == 0);
}

int main(void) {
    static float weights[N];
    pthread_t threads[2];
    int finished[2] = {0, 0};
    float results[2];
    for (size_t k = 0; k < N; ++k) weights[k] = 0.5f + 0.001f * (float)k;
    OK(polder_device_cpu(2, &cpu));
    nulls_and_values(weights);
    objectives(weights);
    states();
    for (int t = 0; t < 2; ++t) pthread_create(&threads[t], NULL, use_one, &finished[t]);
    for (int t = 0; t < 2; ++t) pthread_join(threads[t], NULL);
    for (int t = 0; t < 2; ++t) pthread_create(&threads[t], NULL, use_own, &results[t]);
    for (int t = 0; t < 2; ++t) pthread_join(threads[t], NULL);
    HOLDS(finished[0] == 500 && finished[1] == 500 && results[0] == results[1]);
    polder_optimizer_free(own);
    polder_device_free(cpu);
    printf("misuse is answered with a status, and two threads share an optimizer\n");
    return 0;
}
