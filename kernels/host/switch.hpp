// Switching between fibers. Each has its own stack, and all run on one OS thread.
//
// On x86-64 and aarch64 (System V calling conventions: Linux, macOS) a switch saves the callee-saved registers on the
// old stack and restores those on the new one. It leaves the floating-point control words alone, because kernels do not
// change them. On other platforms, or with POLDER_UCONTEXT, ucontext does it, at the cost of a system call per switch.
// The address sanitizer is notified of every switch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(POLDER_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define POLDER_UCONTEXT 1
#endif
#ifdef POLDER_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define POLDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define POLDER_ASAN 1
#endif
#endif
#ifdef POLDER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef POLDER_UCONTEXT
// Saves the callee-saved registers, stores the stack pointer in *from, and continues at the stack pointer `to`.
extern "C" void polder_fiber_switch(void** from, void* to);

#ifdef __APPLE__
#define POLDER_SYMBOL "_polder_fiber_switch"
#define POLDER_HIDDEN ".private_extern " POLDER_SYMBOL "\n"
#else
#define POLDER_SYMBOL "polder_fiber_switch"
#define POLDER_HIDDEN ".hidden " POLDER_SYMBOL "\n"
#endif

#if defined(__x86_64__)
asm(".text\n"
    ".globl " POLDER_SYMBOL "\n" POLDER_HIDDEN ".p2align 4\n" POLDER_SYMBOL
    ":\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n");
#else
asm(".text\n"
    ".globl " POLDER_SYMBOL "\n" POLDER_HIDDEN ".p2align 4\n" POLDER_SYMBOL
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif
#undef POLDER_SYMBOL
#undef POLDER_HIDDEN
#endif

namespace {

// The point at which a suspended fiber continues. The OS thread's own stack has one too.
struct Context {
#ifdef POLDER_UCONTEXT
    ucontext_t machine;
#else
    void* stack_pointer;
#endif
#ifdef POLDER_ASAN
    void* fake_stack;
    const void* stack_bottom;
    size_t stack_bytes;
#endif
};

// Makes `context` start in `entry` on the stack [low, low + bytes), `unused` bytes (a multiple of 16) below its top.
void context_prepare(Context& context, char* low, size_t bytes, size_t unused, void (*entry)()) {
#ifdef POLDER_UCONTEXT
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = low;
    context.machine.uc_stack.ss_size = bytes - unused;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
#else
#if defined(__x86_64__)
    // Six registers, the address at which to continue, and a return address of zero, which ends a debugger's backtrace.
    // It is 8 above a multiple of 16, like the stack pointer at the entry of a function.
    constexpr int kSlots = 8, kEntry = 6;
#else
    // x19 to x30 (x30 is the address at which to continue), then d8 to d15.
    constexpr int kSlots = 20, kEntry = 11;
#endif
    auto* frame = reinterpret_cast<uintptr_t*>(low + bytes - unused) - kSlots;
    for (int i = 0; i < kSlots; ++i) frame[i] = 0;
    frame[kEntry] = reinterpret_cast<uintptr_t>(entry);
    context.stack_pointer = frame;
#endif
#ifdef POLDER_ASAN
    context.fake_stack = nullptr;
    context.stack_bottom = low;
    context.stack_bytes = bytes;
#endif
}

void context_jump(Context& from, Context& to) {
#ifdef POLDER_UCONTEXT
    swapcontext(&from.machine, &to.machine);
#else
    polder_fiber_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

// Continues at `to`. Returns when something switches back to `from`.
inline void context_switch(Context& from, Context& to) {
#ifdef POLDER_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
    context_jump(from, to);
#ifdef POLDER_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Continues at `to` and ends the running fiber, whose stack may then be reused.
[[noreturn]] inline void context_leave(Context& to) {
    static __thread Context abandoned;
#ifdef POLDER_ASAN
    __sanitizer_start_switch_fiber(nullptr, to.stack_bottom, to.stack_bytes);
#endif
    context_jump(abandoned, to);
    __builtin_unreachable();
}

// Every fiber calls this first: with the context of the OS thread's own stack if it was started from there (its bounds
// become known here), otherwise with null.
inline void context_entered([[maybe_unused]] Context* started_by) {
#ifdef POLDER_ASAN
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (started_by != nullptr) {
        started_by->stack_bottom = bottom;
        started_by->stack_bytes = bytes;
    }
#endif
}

}  // namespace
