/*
 * polder: sharpness-aware optimizers and curvature, on memory of your own.
 *
 * Made from the source of the crate polder-capi. Do not edit.
 */

#ifndef POLDER_H
#define POLDER_H

#include <stddef.h>
#include <stdint.h>

/**
 * What a function answers.
 */
typedef enum {
    /**
     * Done.
     */
    POLDER_STATUS_OK = 0,
    /**
     * An argument that cannot be used: NULL, a length, an address, a name, a value.
     */
    POLDER_STATUS_ARGUMENT = 1,
    /**
     * The device is not there, or it failed.
     */
    POLDER_STATUS_DEVICE = 2,
    /**
     * Memory could not be allocated.
     */
    POLDER_STATUS_MEMORY = 3,
    /**
     * A loss or a gradient is not finite, where a measurement needs it to be.
     */
    POLDER_STATUS_NOT_FINITE = 4,
    /**
     * A callback returned another number than 0.
     */
    POLDER_STATUS_CALLBACK = 5,
    /**
     * The object is in use: by another thread, or by the call whose callback made this one.
     */
    POLDER_STATUS_BUSY = 6,
    /**
     * A fault of this library.
     */
    POLDER_STATUS_PANIC = 7,
} polder_status;

/**
 * The type of the numbers of a vector.
 */
typedef enum {
    /**
     * 32-bit floats.
     */
    POLDER_TYPE_F32 = 0,
    /**
     * 64-bit floats, on the CPU only.
     */
    POLDER_TYPE_F64 = 1,
} polder_type;

/**
 * A device: the CPU or a GPU with a stream.
 */
typedef struct polder_device polder_device;

/**
 * An optimizer for a vector of weights of the caller.
 */
typedef struct polder_optimizer polder_optimizer;

/**
 * A loss with its gradient, as functions of the caller. They are called on the thread of the call that needs them, and
 * must not throw. Each returns 0, or another number to end the call with `POLDER_STATUS_CALLBACK`.
 */
typedef struct {
    /**
     * sizeof(polder_objective). Later versions may add fields at the end.
     */
    size_t size;
    /**
     * Passed to the functions as it is.
     */
    void *context;
    /**
     * Writes the loss at `weights` to `loss` and its gradient to `gradient`. All three lie on the device.
     * `updates_statistics` is 1 in a pass at the unperturbed weights, where running statistics follow, and 0 in all
     * others.
     */
    int32_t (*gradient)(void *context, const void *weights, void *gradient, double *loss, int32_t updates_statistics);
    /**
     * Writes the product of the Hessian at `weights` with `direction` to `product`. NULL if there is none: then
     * methods that need it are answered with `POLDER_STATUS_ARGUMENT`, and so are measurements without a
     * `difference_step`.
     */
    int32_t (*hessian_vector)(void *context, const void *weights, const void *direction, void *product);
    /**
     * If `hessian_vector` is NULL: the distance s from the weights at which `polder_curvature_*` takes two gradients
     * for each product with a direction d, as the central difference of both. 0 if it shall not. Without rounding the
     * error of a product is about |d| s^2/6 times the third derivative of the gradient along d/|d|. Rounding adds
     * about |d| e (|g| + |H| |w|)/s, where e is 1e-7 for f32 and 2e-16 for f64. A good s lies near 5e-3 |w| for f32
     * and 6e-6 |w| for f64. Where the gradient has kinks, as in a network with ReLU, no s makes the error small.
     */
    double difference_step;
} polder_objective;

/**
 * CR-SAM's terms.
 */
typedef struct {
    /**
     * Weight of the curvature term.
     */
    double alpha;
    /**
     * Weight of the slope term.
     */
    double beta;
    /**
     * The curvature term is dropped where A is not above this.
     */
    double a_min;
    /**
     * The slope term is dropped where B is not above this.
     */
    double b_min;
    /**
     * The error of a loss, relative to the first one; a term below its error is dropped.
     */
    double loss_error;
    /**
     * 1 for the logarithms of the paper's equation 7, 0 for the form of the authors' code.
     */
    int32_t log_form;
} polder_cr_sam;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The L2 norm of the gradient.
 *
 * # Safety
 * As `polder_curvature_trace`.
 */
polder_status polder_curvature_gradient_norm(const polder_device *device,
                                             int32_t dtype,
                                             const polder_objective *objective,
                                             const void *weights,
                                             size_t n,
                                             double *norm);

/**
 * The trace of the Hessian by Hutchinson's estimator, with its standard error, from products with `probes` random
 * vectors. With a single probe the standard error is NaN.
 *
 * # Safety
 * `device` is NULL or a live device; `objective` is NULL or as `polder_objective` says; `weights` are `n` numbers on
 * the device; the results are NULL or valid for a number to be written.
 */
polder_status polder_curvature_trace(const polder_device *device,
                                     int32_t dtype,
                                     const polder_objective *objective,
                                     const void *weights,
                                     size_t n,
                                     size_t probes,
                                     uint64_t seed,
                                     double *trace,
                                     double *standard_error);

/**
 * The largest eigenvalues of the Hessian, the largest first, by Lanczos's method with at most `steps` products. Writes
 * at most `room` eigenvalues with their residuals, and their number to `count`. A residual above `tolerance` times the
 * largest magnitude says that an eigenvalue has not converged.
 *
 * # Safety
 * As `polder_curvature_trace`; `values` and `residuals` are NULL or valid for `room` numbers each.
 */
polder_status polder_curvature_eigenvalues(const polder_device *device,
                                           int32_t dtype,
                                           const polder_objective *objective,
                                           const void *weights,
                                           size_t n,
                                           size_t steps,
                                           double tolerance,
                                           uint64_t seed,
                                           size_t room,
                                           double *values,
                                           double *residuals,
                                           size_t *count);

/**
 * The density of the Hessian's eigenvalues by stochastic Lanczos quadrature: peaks at `nodes` with shares `shares`
 * that add up to 1. Both have room for `probes` times `steps` numbers; `count` receives how many were written.
 *
 * # Safety
 * As `polder_curvature_trace`; `nodes` and `shares` are NULL or valid for `probes` times `steps` numbers each.
 */
polder_status polder_curvature_spectrum(const polder_device *device,
                                        int32_t dtype,
                                        const polder_objective *objective,
                                        const void *weights,
                                        size_t n,
                                        size_t probes,
                                        size_t steps,
                                        uint64_t seed,
                                        double *nodes,
                                        double *shares,
                                        size_t *count);

/**
 * The CPU, with so many threads; 0 takes one per core.
 *
 * # Safety
 * `device` is NULL or valid for a pointer to be written.
 */
polder_status polder_device_cpu(uint32_t threads, polder_device **device);

/**
 * GPU number `ordinal`, with a stream of its own.
 *
 * # Safety
 * `device` is NULL or valid for a pointer to be written.
 */
polder_status polder_device_cuda(uint32_t ordinal, polder_device **device);

/**
 * GPU number `ordinal`, with its work on a stream of the caller: a `CUstream` or `cudaStream_t` of the GPU's primary
 * context, NULL for the default stream. The stream must outlive the device and every optimizer made for it.
 *
 * # Safety
 * `stream` is as described; `device` is NULL or valid for a pointer to be written.
 */
polder_status polder_device_adopt(uint32_t ordinal, void *stream, polder_device **device);

/**
 * Waits until all work of the device so far has finished. On the CPU there is nothing to wait for.
 *
 * # Safety
 * `device` is NULL or a live device.
 */
polder_status polder_device_synchronize(const polder_device *device);

/**
 * Gives a device up. Optimizers that were made for it stay usable. NULL does nothing.
 *
 * # Safety
 * `device` is NULL, or a live device that nobody uses any more.
 */
void polder_device_free(polder_device *device);

/**
 * The reason of the calling thread's newest status other than `POLDER_STATUS_OK`, in one line of UTF-8; empty if there
 * was none. It is valid until the thread's next call that fails.
 */
const char *polder_last_error(void);

/**
 * The version of the library, such as "0.1.0".
 */
const char *polder_version(void);

/**
 * Number of methods.
 */
size_t polder_method_count(void);

/**
 * The name of method number `index`, such as "cr-sam"; NULL if there is none.
 */
const char *polder_method_name(size_t index);

/**
 * An optimizer for `length` weights of the type `dtype` (a `polder_type`) on a device.
 *
 * `method` is a name such as "sam", "cr-sam" or "adamw". `options` is NULL or a list such as "rho=0.1 momentum=0.9":
 * the options of the method (docs/methods.md lists them) and base (sgd, adamw or muon), momentum, nesterov, beta1,
 * beta2, eps, weight-decay, decay-length, clip, matrices. Muon needs to know the matrices among the weights, stored
 * row by row: "matrices=0:64x27,1728:64x576" are one of 64 rows and 27 columns from weight 0 on, and a second one.
 *
 * # Safety
 * `device` is NULL or a live device; the texts are NULL or end with a zero byte; `optimizer` is NULL or valid for a
 * pointer to be written.
 */
polder_status polder_optimizer_new(const polder_device *device,
                                   int32_t dtype,
                                   size_t length,
                                   const char *method,
                                   const char *options,
                                   polder_optimizer **optimizer);

/**
 * One step with the learning rate `lr`: the method's passes through the objective at the weights and around them, and
 * the update of the weights in place. If a loss or a gradient is not finite, or a callback fails, no bit of the
 * weights changes.
 *
 * # Safety
 * `optimizer` is NULL or a live optimizer; `objective` is NULL or as `polder_objective` says; `weights` are as many
 * numbers as the optimizer is for, on its device, which nobody else uses during the call.
 */
polder_status polder_optimizer_step(const polder_optimizer *optimizer,
                                    const polder_objective *objective,
                                    void *weights,
                                    double lr);

/**
 * Multiplies the method's rho in the steps that follow, as a schedule asks.
 *
 * # Safety
 * `optimizer` is NULL or a live optimizer.
 */
polder_status polder_optimizer_scale_rho(const polder_optimizer *optimizer, double factor);

/**
 * A number of the newest step: "loss", "gradient-norm", "skipped" (steps skipped since the start), or a number or
 * counter of the method, such as "rho" of SA-SAM. Waits for the device.
 *
 * # Safety
 * `optimizer` is NULL or a live optimizer; `name` is NULL or ends with a zero byte; `value` is NULL or valid for a
 * number to be written.
 */
polder_status polder_optimizer_get(const polder_optimizer *optimizer, const char *name, double *value);

/**
 * The number of bytes of the optimizer's state, for `polder_optimizer_state_get`. It does not change while the
 * optimizer lives.
 *
 * # Safety
 * `optimizer` is NULL or a live optimizer; `bytes` is NULL or valid for a number to be written.
 */
polder_status polder_optimizer_state_size(const polder_optimizer *optimizer, size_t *bytes);

/**
 * Writes all that the steps that follow depend on to `state`, for a checkpoint: momenta, what the method keeps, and
 * the factor of `polder_optimizer_scale_rho`. The weights are not part of it. `bytes` is the number that
 * `polder_optimizer_state_size` gives. Waits for the device.
 *
 * # Safety
 * `optimizer` is NULL or a live optimizer; `state` is NULL or valid for `bytes` bytes to be written, in the host's
 * memory.
 */
polder_status polder_optimizer_state_get(const polder_optimizer *optimizer, void *state, size_t bytes);

/**
 * Takes over a state from `polder_optimizer_state_get`. The steps that follow then have the same bits as those of the
 * optimizer that wrote it, if the weights and the options are the same too. A state of another method, base, type or
 * length, and one with missing or changed bytes, is answered with `POLDER_STATUS_ARGUMENT`, and nothing changes. Until
 * the next step `polder_optimizer_get` knows only counters.
 *
 * # Safety
 * `optimizer` is NULL or a live optimizer; `state` is NULL or valid for `bytes` bytes to be read, in the host's
 * memory.
 */
polder_status polder_optimizer_state_set(const polder_optimizer *optimizer, const void *state, size_t bytes);

/**
 * Gives an optimizer up. NULL does nothing.
 *
 * # Safety
 * `optimizer` is NULL, or a live optimizer that nobody uses any more.
 */
void polder_optimizer_free(polder_optimizer *optimizer);

/**
 * norm[0] = the L2 norm of x, summed in double precision.
 *
 * # Safety
 * Every pointer is NULL or valid for its elements on the device; `device` is NULL or a live device.
 */
polder_status polder_norm(const polder_device *device, int32_t dtype, size_t n, const void *x, double *norm);

/**
 * product[0] = the inner product of x and y, summed in double precision.
 *
 * # Safety
 * As `polder_norm`.
 */
polder_status polder_dot(const polder_device *device,
                         int32_t dtype,
                         size_t n,
                         const void *x,
                         const void *y,
                         double *product);

/**
 * y += alpha x.
 *
 * # Safety
 * As `polder_norm`; x and y do not overlap.
 */
polder_status polder_axpy(const polder_device *device, int32_t dtype, size_t n, double alpha, const void *x, void *y);

/**
 * SAM's perturbed weights: plus = w + rho g/(norm + 1e-12) and, unless minus is NULL, minus = w − rho g/(norm +
 * 1e-12), both in one pass over the vectors.
 *
 * # Safety
 * As `polder_norm`; plus and minus overlap no other vector.
 */
polder_status polder_perturb(const polder_device *device,
                             int32_t dtype,
                             size_t n,
                             const void *w,
                             const void *g,
                             const double *norm,
                             double rho,
                             void *plus,
                             void *minus);

/**
 * ASAM's norm: norm[0] = the L2 norm of T g, where T = |w| + eta for the first scaled elements and 1 for the others.
 *
 * # Safety
 * As `polder_norm`.
 */
polder_status polder_asam_norm(const polder_device *device,
                               int32_t dtype,
                               size_t n,
                               const void *w,
                               const void *g,
                               double eta,
                               size_t scaled,
                               double *norm);

/**
 * ASAM's perturbed weights: plus = w + rho T² g/(norm + 1e-12), with the norm of `polder_asam_norm`.
 *
 * # Safety
 * As `polder_perturb`.
 */
polder_status polder_asam_perturb(const polder_device *device,
                                  int32_t dtype,
                                  size_t n,
                                  const void *w,
                                  const void *g,
                                  double eta,
                                  size_t scaled,
                                  const double *norm,
                                  double rho,
                                  void *plus);

/**
 * The coefficients c0, c+, c− of CR-SAM's gradient c0 g0 + c+ g+ + c− g−, from the losses at w, w + rho v and w − rho
 * v. coefficients has room for four numbers (the fourth is not written). dropped[0] and dropped[1] count the dropped
 * terms.
 *
 * # Safety
 * Every pointer is NULL or valid on the device: three losses, four coefficients, one flag, two counters; `terms` in
 * the host's memory.
 */
polder_status polder_cr_sam_coefficients(const polder_device *device,
                                         const double *losses,
                                         const polder_cr_sam *terms,
                                         double *coefficients,
                                         const uint32_t *skip,
                                         uint32_t *dropped);

/**
 * One step of SGD in one pass: g = Σ c_k g_k + weight_decay w, m = momentum m + g, w −= lr m (with Nesterov's momentum
 * w −= lr (g + momentum m)). Nothing is written where skip[0] is not 0.
 *
 * # Safety
 * Every pointer is NULL or valid on the device; `gradients` is an array of `count` pointers in the host's memory;
 * `coefficients` has four numbers, of which the first `count` are used; w and m overlap no other vector.
 */
polder_status polder_sgd(const polder_device *device,
                         int32_t dtype,
                         size_t n,
                         void *w,
                         void *m,
                         const void *const *gradients,
                         size_t count,
                         const double *coefficients,
                         double lr,
                         double momentum,
                         int32_t nesterov,
                         double weight_decay,
                         const uint32_t *skip);

/**
 * One step of AdamW in one pass: g = Σ c_k g_k, m = beta1 m + (1 − beta1) g, v = beta2 v + (1 − beta2) g²,
 * w = (1 − lr weight_decay) w − lr/(1 − beta1^t) m/(sqrt(v)/sqrt(1 − beta2^t) + eps), where t = step[0] counts from 1.
 * Nothing is written where skip[0] is not 0.
 *
 * # Safety
 * As `polder_sgd`; `step` and `skip` are one number each on the device.
 */
polder_status polder_adamw(const polder_device *device,
                           int32_t dtype,
                           size_t n,
                           void *w,
                           void *m,
                           void *v,
                           const void *const *gradients,
                           size_t count,
                           const double *coefficients,
                           double lr,
                           double beta1,
                           double beta2,
                           double eps,
                           double weight_decay,
                           const uint32_t *step,
                           const uint32_t *skip);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* POLDER_H */
