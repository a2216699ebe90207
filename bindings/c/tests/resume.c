/* Every method and base in both types: a program that stops after five steps and resumes has the bits of one that does
 * not stop. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "polder.h"

enum { N = 37, STEPS = 5 };

static void check(polder_status status, const char *what) {
    if (status == POLDER_STATUS_OK) return;
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, polder_last_error());
    exit(1);
}

/* Weights in either type. */
union numbers {
    float f32[N];
    double f64[N];
};

/* The type of the numbers is the context. */
static double at(const int32_t *type, const void *vector, size_t k) {
    return *type == POLDER_TYPE_F32 ? (double)((const float *)vector)[k] : ((const double *)vector)[k];
}

static void put(const int32_t *type, void *vector, size_t k, double value) {
    if (*type == POLDER_TYPE_F32) ((float *)vector)[k] = (float)value;
    else ((double *)vector)[k] = value;
}

/* sum k w_k^2/2N + w_k^4/4 */
static int32_t gradient(void *context, const void *weights, void *gradient, double *loss, int32_t updates_statistics) {
    (void)updates_statistics;
    *loss = 0;
    for (size_t k = 0; k < N; ++k) {
        const double w = at(context, weights, k), scale = (double)(k + 1) / N;
        put(context, gradient, k, scale * w + w * w * w);
        *loss += scale * w * w / 2 + w * w * w * w / 4;
    }
    return 0;
}

static int32_t hessian_vector(void *context, const void *weights, const void *direction, void *product) {
    for (size_t k = 0; k < N; ++k) {
        const double w = at(context, weights, k);
        put(context, product, k, ((double)(k + 1) / N + 3 * w * w) * at(context, direction, k));
    }
    return 0;
}

static void resume(const polder_device *device, int32_t type, const char *method, const char *options) {
    const polder_objective objective = {sizeof objective, &type, gradient, hessian_vector, 0};
    union numbers start, weights, again;
    polder_optimizer *whole, *resumed;
    size_t bytes;
    for (size_t k = 0; k < N; ++k) put(&type, &start, k, 0.3 + 0.01 * (double)k);
    weights = start;
    check(polder_optimizer_new(device, type, N, method, options, &whole), method);
    check(polder_optimizer_scale_rho(whole, 0.75), method);
    for (int step = 0; step < STEPS; ++step) check(polder_optimizer_step(whole, &objective, &weights, 0.05), method);
    check(polder_optimizer_state_size(whole, &bytes), "size");
    void *state = malloc(bytes);
    if (state == NULL) exit(1);
    check(polder_optimizer_state_get(whole, state, bytes), "get");
    again = weights;
    for (int step = 0; step < STEPS; ++step) check(polder_optimizer_step(whole, &objective, &weights, 0.05), method);

    check(polder_optimizer_new(device, type, N, method, options, &resumed), method);
    check(polder_optimizer_state_set(resumed, state, bytes), "set");
    for (int step = 0; step < STEPS; ++step) check(polder_optimizer_step(resumed, &objective, &again, 0.05), method);
    const size_t length = type == POLDER_TYPE_F32 ? sizeof start.f32 : sizeof start.f64;
    if (memcmp(&weights, &again, length) != 0 || memcmp(&weights, &start, length) == 0) {
        fprintf(stderr, "%s, %s: the resumed steps differ\n", method, options);
        exit(1);
    }
    free(state);
    polder_optimizer_free(whole);
    polder_optimizer_free(resumed);
}

int main(void) {
    static const char *const bases[] = {"sgd", "adamw", "muon"};
    /* Muon's matrices do not cover all weights. */
    static const char *const of_base[] = {"", "", " matrices=0:5x7"};
    polder_device *cpu;
    int runs = 0;
    check(polder_device_cpu(1, &cpu), "device");
    for (size_t number = 0; number < polder_method_count(); ++number) {
        const char *method = polder_method_name(number);
        int is_base = 0;
        for (size_t base = 0; base < 3; ++base) is_base |= strcmp(method, bases[base]) == 0;
        for (size_t base = 0; base < 3; ++base) {
            char options[64];
            /* A method that is a base has no other. */
            if (is_base && strcmp(method, bases[base]) != 0) continue;
            snprintf(options, sizeof options, "weight-decay=0.01 base=%s%s", bases[base], of_base[base]);
            resume(cpu, POLDER_TYPE_F32, method, options);
            resume(cpu, POLDER_TYPE_F64, method, options);
            runs += 2;
        }
    }
    polder_device_free(cpu);
    printf("%d runs resume with the same bits\n", runs);
    return 0;
}
