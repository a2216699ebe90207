// A small network written by hand, on two spirals of points: its weights lie in a std::vector, and SAM, CR-SAM and
// AdamW train them there.
//
//     cargo build --release -p polder-capi
//     c++ -std=c++17 -I bindings/c/include bindings/c/examples/network.cpp -L target/release -lpolder_capi
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "polder.h"

namespace {

constexpr size_t HIDDEN = 32, POINTS = 120;
constexpr size_t WEIGHTS = 4 * HIDDEN + 1;

void check(polder_status status) {
    if (status != POLDER_STATUS_OK) throw std::runtime_error(polder_last_error());
}

struct Free {
    void operator()(polder_device* device) const { polder_device_free(device); }
    void operator()(polder_optimizer* optimizer) const { polder_optimizer_free(optimizer); }
};

/// One hidden layer of tanh units and the logistic loss.
struct Network {
    std::vector<double> x, y;
    std::vector<int> label;

    Network() {
        for (size_t k = 0; k < POINTS; ++k) {
            const double turn = 0.5 + 3.0 * double(k / 2) / (POINTS / 2), side = k % 2 ? 1.0 : -1.0;
            x.push_back(side * turn * std::cos(turn));
            y.push_back(side * turn * std::sin(turn));
            label.push_back(int(k % 2));
        }
    }

    /// The loss, with its gradient unless that is null; counts the points on the right side.
    double pass(const double* w, double* g, int* right) const {
        double loss = 0;
        if (g != nullptr) std::fill(g, g + WEIGHTS, 0.0);
        for (size_t k = 0; k < POINTS; ++k) {
            double hidden[HIDDEN], logit = w[WEIGHTS - 1];
            for (size_t h = 0; h < HIDDEN; ++h) {
                hidden[h] = std::tanh(w[4 * h] * x[k] + w[4 * h + 1] * y[k] + w[4 * h + 2]);
                logit += w[4 * h + 3] * hidden[h];
            }
            const double sign = label[k] ? 1.0 : -1.0, margin = sign * logit;
            loss += std::log1p(std::exp(-std::fabs(margin))) + std::max(-margin, 0.0);
            if (right != nullptr) *right += margin > 0;
            if (g == nullptr) continue;
            const double d = -sign / (1.0 + std::exp(margin)) / POINTS;
            g[WEIGHTS - 1] += d;
            for (size_t h = 0; h < HIDDEN; ++h) {
                const double inner = d * w[4 * h + 3] * (1.0 - hidden[h] * hidden[h]);
                g[4 * h] += inner * x[k];
                g[4 * h + 1] += inner * y[k];
                g[4 * h + 2] += inner;
                g[4 * h + 3] += d * hidden[h];
            }
        }
        return loss / POINTS;
    }
};

/// No exception may leave a callback.
extern "C" int32_t gradient(void* context, const void* weights, void* gradient, double* loss, int32_t) noexcept {
    const auto& network = *static_cast<const Network*>(context);
    *loss = network.pass(static_cast<const double*>(weights), static_cast<double*>(gradient), nullptr);
    return 0;
}

}  // namespace

int main() try {
    Network network;
    // Without products with the Hessian, the curvature comes from differences of gradients at this distance.
    const polder_objective objective{sizeof objective, &network, gradient, nullptr, 1e-5};
    polder_device* made;
    check(polder_device_cpu(1, &made));
    const std::unique_ptr<polder_device, Free> cpu(made);
    const std::pair<const char*, const char*> methods[] = {
        {"sam", "rho=0.02"}, {"cr-sam", "rho=0.02 alpha=0.001 beta=0.001"}, {"adamw", "weight-decay=0.001"}};
    for (const auto& [method, options] : methods) {
        std::mt19937 random(1);
        std::normal_distribution<double> normal(0.0, 0.7);
        std::vector<double> weights(WEIGHTS);
        for (double& weight : weights) weight = normal(random);
        const double before = network.pass(weights.data(), nullptr, nullptr);
        polder_optimizer* created;
        check(polder_optimizer_new(cpu.get(), POLDER_TYPE_F64, WEIGHTS, method, options, &created));
        const std::unique_ptr<polder_optimizer, Free> optimizer(created);
        const double lr = std::string(method) == "adamw" ? 0.02 : 0.2;
        for (int step = 0; step < 3000; ++step)
            check(polder_optimizer_step(optimizer.get(), &objective, weights.data(), lr));
        int right = 0;
        const double after = network.pass(weights.data(), nullptr, &right);
        std::printf("%-8s loss %.3f from %.3f, %d of %zu points right\n", method, after, before, right, POINTS);
        double largest, residual;
        size_t count;
        check(polder_curvature_eigenvalues(cpu.get(), POLDER_TYPE_F64, &objective, weights.data(), WEIGHTS, 40, 1e-6, 1,
                                           1, &largest, &residual, &count));
        std::printf("%-8s largest eigenvalue of the Hessian %.2e, residual %.1e\n", "", largest, residual);
        if (count != 1 || !(largest > 0.0) || residual > 1e-3 * largest)
            throw std::runtime_error("the eigenvalue has not converged");
        if (right < int(POINTS * 9 / 10)) throw std::runtime_error("the network has not learned the spirals");
    }
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
