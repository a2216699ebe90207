/* Every method on a quadratic in an array of this program, and the curvature there.
 *
 *     cargo build --release -p polder-capi
 *     cc -std=c99 -I bindings/c/include bindings/c/examples/quadratic.c -L target/release -lpolder_capi -lm
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "polder.h"

enum { N = 100 };

/* 1/2 sum k (w_k - 1)^2 / N for k from 1 to N: the Hessian is diagonal, with the entries k/N. */
static double entry(size_t k) { return (double)(k + 1) / N; }

static int32_t gradient(void *context, const void *weights, void *gradient, double *loss, int32_t updates_statistics) {
    const float *w = weights;
    float *g = gradient;
    (void)updates_statistics;
    ++*(long *)context;
    *loss = 0;
    for (size_t k = 0; k < N; ++k) {
        const double distance = w[k] - 1.0;
        g[k] = (float)(entry(k) * distance);
        *loss += 0.5 * entry(k) * distance * distance;
    }
    return 0;
}

static int32_t hessian_vector(void *context, const void *weights, const void *direction, void *product) {
    const float *d = direction;
    float *p = product;
    (void)context, (void)weights;
    for (size_t k = 0; k < N; ++k) p[k] = (float)(entry(k) * d[k]);
    return 0;
}

static void check(polder_status status, const char *what) {
    if (status == POLDER_STATUS_OK) return;
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, polder_last_error());
    exit(1);
}

static void expect(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "not so: %s\n", what);
    exit(1);
}

int main(void) {
    long passes = 0;
    const polder_objective objective = {sizeof objective, &passes, gradient, hessian_vector, 0};
    polder_device *cpu;
    check(polder_device_cpu(1, &cpu), "device");

    for (size_t number = 0; number < polder_method_count(); ++number) {
        const char *method = polder_method_name(number);
        polder_optimizer *optimizer;
        float weights[N] = {0};
        double loss, skipped;
        /* Muon has to know which weights are matrices: here all of them, as one of 2 rows and 50 columns. */
        const char *options = strcmp(method, "muon") == 0 ? "matrices=0:2x50" : NULL;
        check(polder_optimizer_new(cpu, POLDER_TYPE_F32, N, method, options, &optimizer), method);
        passes = 0;
        for (int step = 0; step < 200; ++step)
            check(polder_optimizer_step(optimizer, &objective, weights, 0.05), method);
        check(polder_optimizer_get(optimizer, "loss", &loss), "loss");
        check(polder_optimizer_get(optimizer, "skipped", &skipped), "skipped");
        printf("%-12s loss %.2e after 200 steps and %ld gradients\n", method, loss, passes);
        expect(loss < 2.0 && skipped == 0, "the loss falls from 25, and no step is skipped");
        polder_optimizer_free(optimizer);
    }

    {
        /* The same kernels without an optimizer: the weights of a SAM step on both sides. */
        float weights[N], g[N], plus[N], minus[N];
        double norm, loss, expected = 0;
        for (size_t k = 0; k < N; ++k) weights[k] = (float)k / N;
        expect(gradient(&passes, weights, g, &loss, 1) == 0, "the gradient");
        for (size_t k = 0; k < N; ++k) expected += (double)g[k] * g[k];
        check(polder_norm(cpu, POLDER_TYPE_F32, N, g, &norm), "norm");
        check(polder_perturb(cpu, POLDER_TYPE_F32, N, weights, g, &norm, 0.05, plus, minus), "perturb");
        expect(fabs(norm * norm - expected) < 1e-9 * expected, "the norm");
        for (size_t k = 0; k < N; ++k) {
            const double by = 0.05 * g[k] / norm;
            expect(fabs(plus[k] - weights[k] - by) < 1e-6 && fabs(minus[k] - weights[k] + by) < 1e-6, "w +- rho v");
        }
    }

    {
        const float weights[N] = {0};
        double trace, error, values[3], residuals[3], nodes[2 * 20], shares[2 * 20], sum = 0, mean = 0;
        size_t count;
        const double exact = (N + 1) / 2.0;
        check(polder_curvature_trace(cpu, POLDER_TYPE_F32, &objective, weights, N, 4, 1, &trace, &error), "trace");
        printf("trace %.4f +- %.1e, exactly %.1f\n", trace, error, exact);
        expect(fabs(trace - exact) < 1e-4 * exact, "the trace");
        /* The same from gradients alone; |w - 1| is 10. */
        const polder_objective gradients = {sizeof gradients, &passes, gradient, NULL, 0.05};
        check(polder_curvature_trace(cpu, POLDER_TYPE_F32, &gradients, weights, N, 4, 1, &trace, &error), "trace");
        printf("trace %.4f from differences of gradients\n", trace);
        expect(fabs(trace - exact) < 1e-3 * exact, "the trace from differences");
        check(polder_curvature_eigenvalues(cpu, POLDER_TYPE_F32, &objective, weights, N, 100, 1e-6, 1, 3, values,
                                           residuals, &count),
              "eigenvalues");
        printf("eigenvalues %.4f %.4f %.4f\n", values[0], values[1], values[2]);
        expect(count == 3 && fabs(values[0] - 1.0) < 1e-3 && fabs(values[2] - 0.98) < 1e-3, "the eigenvalues");
        check(polder_curvature_spectrum(cpu, POLDER_TYPE_F32, &objective, weights, N, 2, 20, 1, nodes, shares, &count),
              "spectrum");
        for (size_t k = 0; k < count; ++k) sum += shares[k], mean += nodes[k] * shares[k];
        printf("spectrum: %zu peaks with the mean %.4f, exactly %.4f\n", count, mean, exact / N);
        expect(count == 40 && fabs(sum - 1.0) < 1e-9 && fabs(mean - exact / N) < 1e-4, "the spectrum");
    }
    polder_device_free(cpu);
    return 0;
}
