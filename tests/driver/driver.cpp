// A CUDA driver (libcuda) without a GPU: the functions that src/device/cuda.rs and the buffers of cust (interop/cust)
// call, for one device whose kernels are interpreted.
//
// Work runs as late as allowed, when something waits for it, and streams and the branches of a graph take turns at
// random (DRIVER_SEED). So a missing wait, or memory that is freed too early, leads to wrong results. Misuse that a
// real driver might accept ends the process with a message.
//
// DRIVER_IMAGES is a folder with the kernels: for every NAME.fatbin that is loaded, its PTX as NAME.ptx. README.md
// lists the other settings.
#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>

#include "ptx.hpp"

namespace {

using Work = std::function<void()>;

struct Node {
    Work work;
    std::vector<int> after;
};
struct Graph {
    std::vector<Node> nodes;
    bool is_complete = false;
};

/// An item of a stream: a piece of work, a wait for an event, or the nodes of a graph one by one.
struct Item {
    Work work;
    std::shared_ptr<bool> waits_for;
    std::shared_ptr<const Graph> graph;
    std::vector<bool> done;
    size_t left = 0;
};

struct Stream {
    std::deque<Item> items;
    /// The graph being captured, and the nodes on which the next one depends.
    std::shared_ptr<Graph> capture;
    bool began_capture = false;
    std::vector<int> last;
    /// Whether the last item is a kernel. Then the next kernel may be launched early.
    bool behind_kernel = false;
};

struct Event {
    bool is_timed = false;
    std::shared_ptr<bool> passed = std::make_shared<bool>(true);
    std::shared_ptr<double> time = std::make_shared<double>(0.0);
    /// The position in the graph, for an event that was recorded in a capture.
    std::shared_ptr<Graph> capture;
    std::vector<int> last;
};

/// A kernel of a loaded module, with the current limit of its shared memory.
struct Function {
    std::shared_ptr<const Kernel> kernel;
    uint32_t shared_limit = 48 << 10;
};
struct Module {
    std::map<std::string, Function> functions;
};

struct Executable {
    std::shared_ptr<const Graph> graph;
};

/// One lock for everything: tests run in parallel, and the interpreter has threads of its own.
std::mutex everything;
thread_local bool has_context = false;
std::vector<Stream*> streams;
std::map<const char*, size_t> page_locked;
std::mt19937 dice(uint32_t(setting("DRIVER_SEED", 0)));
char context;
/// Whether a kernel has failed. Then every call does.
bool is_lost = false;

/// Whether the driver behaves in this way, which a real one may (DRIVER_FAULT).
bool has_fault(const char* name) {
    static const char* const chosen = getenv("DRIVER_FAULT");
    return chosen != nullptr && strcmp(chosen, name) == 0;
}

/// Every call that needs a context begins with this.
#define POLDER_DRIVER                                                   \
    const std::lock_guard<std::mutex> lock(everything);                 \
    if (!has_context) fail("%s: this thread has no context", __func__); \
    if (is_lost) return CUDA_ERROR_ILLEGAL_ADDRESS

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The stream of a handle. The null handle is the default stream, which exists from its first use on. Work of other
/// streams does not wait for it, as theirs are non-blocking.
Stream* stream_of(CUstream handle) {
    static Stream* const default_stream = streams.emplace_back(new Stream);
    return handle != nullptr ? reinterpret_cast<Stream*>(handle) : default_stream;
}

/// Does one step of a stream's first item. Returns whether there was one.
bool step(Stream& stream) {
    if (stream.items.empty()) return false;
    Item& item = stream.items.front();
    if (item.waits_for != nullptr && !*item.waits_for) return false;
    if (item.graph != nullptr && item.left > 0) {
        const std::vector<Node>& nodes = item.graph->nodes;
        std::vector<size_t> ready;
        for (size_t n = 0; n < nodes.size() && ready.size() < 4; ++n) {
            const auto& after = nodes[n].after;
            if (!item.done[n] && std::all_of(after.begin(), after.end(), [&](int m) { return item.done[m]; }))
                ready.push_back(n);
        }
        const size_t chosen = ready[dice() % ready.size()];
        nodes[chosen].work();
        item.done[chosen] = true;
        if (--item.left > 0) return true;
    }
    const Work work = std::move(item.work);
    stream.items.pop_front();
    if (work) work();
    return true;
}

/// Lets the streams take turns until the condition holds.
template <class F>
void work_until(F holds) {
    while (!holds()) {
        std::vector<Stream*> turns = streams;
        std::shuffle(turns.begin(), turns.end(), dice);
        bool any = false;
        for (Stream* stream : turns) {
            for (auto steps = dice() % 4 + 1; steps > 0 && !holds(); --steps) any = step(*stream) || any;
        }
        if (!any && !holds()) fail("streams wait for one another");
    }
}

/// Does all work of all streams.
void finish_all() {
    work_until([] { return std::all_of(streams.begin(), streams.end(), [](Stream* s) { return s->items.empty(); }); });
}

/// Adds work to a stream, or to the graph that it captures.
void submit(CUstream handle, Work work) {
    Stream& stream = *stream_of(handle);
    if (stream.capture == nullptr) {
        stream.items.push_back({.work = std::move(work), .waits_for = {}, .graph = {}, .done = {}});
        return;
    }
    auto& nodes = stream.capture->nodes;
    nodes.push_back({std::move(work), stream.last});
    stream.last = {int(nodes.size()) - 1};
}

void submit_copy(CUstream handle, Work work) {
    submit(handle, std::move(work));
    stream_of(handle)->behind_kernel = false;
}

void check_page_locked(const void* address, size_t bytes) {
    const char* at = static_cast<const char*>(address);
    auto found = page_locked.upper_bound(at);
    if (found == page_locked.begin() || at + bytes > std::prev(found)->first + std::prev(found)->second) {
        fail("an asynchronous copy of %zu bytes with host memory that is not page-locked, or no longer", bytes);
    }
}

std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("%s cannot be read", path.c_str());
    return {std::istreambuf_iterator<char>(file), {}};
}

/// The kernels of a fatbin, which is found by its content.
const Kernels* find_kernels(const char* image) {
    static std::map<std::string, Kernels> known;
    const char* folder = getenv("DRIVER_IMAGES");
    if (folder == nullptr) fail("DRIVER_IMAGES is not set");
    uint16_t header;
    uint64_t bytes;
    memcpy(&header, image + 6, sizeof header);
    memcpy(&bytes, image + 8, sizeof bytes);
    const std::string content(image, header + bytes);
    if (const auto found = known.find(content); found != known.end()) return &found->second;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        const std::filesystem::path& path = entry.path();
        if (path.extension() != ".fatbin" || read_file(path).compare(0, content.size(), content) != 0) continue;
        return &(known[content] = parse(read_file(std::filesystem::path(path).replace_extension(".ptx")), path.stem()));
    }
    return nullptr;
}

}  // namespace

extern "C" {

// ---- The driver and its device --------------------------------------------------------------------------------------

CUresult cuInit(unsigned) { return has_fault("no-gpu") ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = int(setting("DRIVER_VERSION", 13000)), CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char** name) {
    static thread_local char text[32];
    snprintf(text, sizeof text, "error %d", int(error));
    return *name = text, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) {
    if (number != 0) return CUDA_ERROR_INVALID_DEVICE;
    return *device = 0, CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int room, CUdevice) {
    return snprintf(name, size_t(room), "interpreted PTX"), CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return *bytes = Memory::CAPACITY, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = int(setting("DRIVER_MULTIPROCESSORS", 132)); break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* result, CUdevice) {
    if (has_fault("exclusive")) return CUDA_ERROR_DEVICE_UNAVAILABLE;
    return *result = reinterpret_cast<CUcontext>(&context), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice, unsigned) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* result) {
    return *result = has_context ? reinterpret_cast<CUcontext>(&context) : nullptr, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext current) { return has_context = current != nullptr, CUDA_SUCCESS; }
CUresult cuCtxSynchronize() {
    POLDER_DRIVER;
    finish_all();
    return CUDA_SUCCESS;
}

// ---- Memory --------------------------------------------------------------------------------------------------------

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    POLDER_DRIVER;
    return *total = Memory::CAPACITY, *free = Memory::CAPACITY - memory().used(), CUDA_SUCCESS;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) {
    return *pool = reinterpret_cast<CUmemoryPool>(&context), CUDA_SUCCESS;
}
CUresult cuMemPoolCreate(CUmemoryPool* pool, const CUmemPoolProps* properties) {
    POLDER_DRIVER;
    const CUmemLocation& at = properties->location;
    const bool here = at.type == CU_MEM_LOCATION_TYPE_DEVICE && at.id == 0;
    if (properties->allocType != CU_MEM_ALLOCATION_TYPE_PINNED || !here) return CUDA_ERROR_INVALID_VALUE;
    return *pool = reinterpret_cast<CUmemoryPool>(new char), CUDA_SUCCESS;
}
CUresult cuMemPoolDestroy(CUmemoryPool pool) {
    POLDER_DRIVER;
    delete reinterpret_cast<char*>(pool);
    return CUDA_SUCCESS;
}
CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute, void*) {
    if (pool == reinterpret_cast<CUmemoryPool>(&context)) fail("the process's memory pool is changed");
    return CUDA_SUCCESS;
}
CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute, void* value) {
    POLDER_DRIVER;
    const cuuint64_t used = memory().used();
    return memcpy(value, &used, sizeof used), CUDA_SUCCESS;
}
CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }
CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) {
    POLDER_DRIVER;
    if (stream_of(stream)->capture != nullptr) fail("an allocation in a capture");
    *address = memory().allocate(bytes);
    return *address != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, CUmemoryPool, CUstream stream) {
    return cuMemAllocAsync(address, bytes, stream);
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    POLDER_DRIVER;
    if (stream_of(stream)->capture != nullptr) fail("memory is freed in a capture");
    submit(stream, [=] { memory().release(address); });
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    POLDER_DRIVER;
    *address = memory().allocate(bytes);
    return *address != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFree_v2(CUdeviceptr address) {
    POLDER_DRIVER;
    // It waits for all work.
    finish_all();
    memory().release(address);
    return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    POLDER_DRIVER;
    *address = malloc(bytes);
    memset(*address, 0x99, bytes);
    page_locked[static_cast<char*>(*address)] = bytes;
    return CUDA_SUCCESS;
}
CUresult cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
CUresult cuMemFreeHost(void* address) {
    POLDER_DRIVER;
    if (page_locked.erase(static_cast<char*>(address)) == 0) fail("memory is freed that is not page-locked");
    free(address);
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, CUstream stream) {
    POLDER_DRIVER;
    submit_copy(stream, [=] {
        memory().check(to, bytes, "a fill");
        memset(reinterpret_cast<void*>(to), byte, bytes);
    });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    POLDER_DRIVER;
    submit_copy(stream, [=] {
        check_page_locked(from, bytes);
        memory().check(to, bytes, "a copy to the device");
        memcpy(reinterpret_cast<void*>(to), from, bytes);
    });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    POLDER_DRIVER;
    submit_copy(stream, [=] {
        check_page_locked(to, bytes);
        memory().check(from, bytes, "a copy to the host");
        memcpy(to, reinterpret_cast<const void*>(from), bytes);
    });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    POLDER_DRIVER;
    if (to < from + bytes && from < to + bytes) fail("a copy of %zu bytes onto itself", bytes);
    submit_copy(stream, [=] {
        memory().check(from, bytes, "a copy's source");
        memory().check(to, bytes, "a copy's destination");
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    });
    return CUDA_SUCCESS;
}

// Copies that wait run on the default stream. They wait for no other stream, although a GPU has streams that they do
// wait for.
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    POLDER_DRIVER;
    work_until([stream = stream_of(nullptr)] { return stream->items.empty(); });
    memory().check(to, bytes, "a copy to the device");
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    POLDER_DRIVER;
    work_until([stream = stream_of(nullptr)] { return stream->items.empty(); });
    memory().check(from, bytes, "a copy to the host");
    memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return CUDA_SUCCESS;
}

// ---- Streams and events ---------------------------------------------------------------------------------------------

CUresult cuStreamCreate(CUstream* stream, unsigned) {
    POLDER_DRIVER;
    streams.push_back(new Stream);
    return *stream = reinterpret_cast<CUstream>(streams.back()), CUDA_SUCCESS;
}
CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
CUresult cuStreamSynchronize(CUstream handle) {
    POLDER_DRIVER;
    const Stream& stream = *stream_of(handle);
    if (stream.capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    work_until([&] { return stream.items.empty(); });
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream handle) {
    POLDER_DRIVER;
    Stream* stream = stream_of(handle);
    work_until([&] { return stream->items.empty(); });
    std::erase(streams, stream);
    delete stream;
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* event, unsigned flags) {
    POLDER_DRIVER;
    Event* made = new Event;
    made->is_timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
    return *event = reinterpret_cast<CUevent>(made), CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) {
    POLDER_DRIVER;
    delete reinterpret_cast<Event*>(event);
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    POLDER_DRIVER;
    Event& event = *reinterpret_cast<Event*>(handle);
    const Stream& stream = *stream_of(stream_handle);
    event.capture = stream.capture;
    event.last = stream.last;
    if (stream.capture != nullptr) return CUDA_SUCCESS;
    event.passed = std::make_shared<bool>(false);
    event.time = std::make_shared<double>(0.0);
    submit(stream_handle, [passed = event.passed, time = event.time] {
        *passed = true;
        *time = seconds();
    });
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent handle) {
    POLDER_DRIVER;
    const Event& event = *reinterpret_cast<Event*>(handle);
    if (event.capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
    work_until([passed = event.passed] { return *passed; });
    return CUDA_SUCCESS;
}
CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent from, CUevent to) {
    POLDER_DRIVER;
    const Event &first = *reinterpret_cast<Event*>(from), &second = *reinterpret_cast<Event*>(to);
    if (!first.is_timed || !second.is_timed) return CUDA_ERROR_INVALID_HANDLE;
    if (!*first.passed || !*second.passed) return CUDA_ERROR_NOT_READY;
    return *milliseconds = float((*second.time - *first.time) * 1e3), CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
    POLDER_DRIVER;
    Stream& stream = *stream_of(handle);
    const Event& event = *reinterpret_cast<Event*>(event_handle);
    stream.behind_kernel = false;
    if (event.capture == nullptr) {
        if (stream.capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        stream.items.push_back({.work = {}, .waits_for = event.passed, .graph = {}, .done = {}});
        return CUDA_SUCCESS;
    }
    // A stream joins a capture by a wait for one of its events.
    if (event.capture->is_complete) fail("a stream waits for an event of a capture that has ended");
    if (stream.capture == nullptr) {
        stream.capture = event.capture;
        stream.last.clear();
    }
    if (stream.capture != event.capture) return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    std::set<int> last(stream.last.begin(), stream.last.end());
    last.insert(event.last.begin(), event.last.end());
    stream.last.assign(last.begin(), last.end());
    return CUDA_SUCCESS;
}

// ---- Kernels -------------------------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    POLDER_DRIVER;
    if (reinterpret_cast<uintptr_t>(image) % 8 != 0) fail("a fatbin that is not aligned");
    const Kernels* kernels = find_kernels(static_cast<const char*>(image));
    if (kernels == nullptr || has_fault("no-binary")) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    Module* loaded = new Module;
    for (const auto& [name, kernel] : *kernels) loaded->functions[name].kernel = kernel;
    return *module = reinterpret_cast<CUmodule>(loaded), CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    POLDER_DRIVER;
    delete reinterpret_cast<Module*>(module);
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    POLDER_DRIVER;
    auto& functions = reinterpret_cast<Module*>(module)->functions;
    const auto found = functions.find(name);
    if (found == functions.end()) return CUDA_ERROR_NOT_FOUND;
    return *function = reinterpret_cast<CUfunction>(&found->second), CUDA_SUCCESS;
}
constexpr uint32_t MOST_SHARED = 227 << 10;
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    POLDER_DRIVER;
    const Function& function = *reinterpret_cast<Function*>(handle);
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            *value = int(function.shared_limit - function.kernel->static_shared);
            break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = 90; break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    POLDER_DRIVER;
    Function& function = *reinterpret_cast<Function*>(handle);
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0) return CUDA_ERROR_INVALID_VALUE;
    const uint32_t limit = uint32_t(value) + function.kernel->static_shared;
    if (limit > MOST_SHARED) return CUDA_ERROR_INVALID_VALUE;
    return function.shared_limit = limit, CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void**) {
    POLDER_DRIVER;
    const Function& function = *reinterpret_cast<Function*>(handle);
    const Kernel& kernel = *function.kernel;
    Stream& stream = *stream_of(config->hStream);
    const uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
    const bool empty = threads == 0 || uint64_t(grid[0]) * grid[1] * grid[2] == 0;
    if (empty || threads > kernel.most_threads || block[2] > 64 || grid[0] > INT32_MAX || grid[1] > 65535 ||
        grid[2] > 65535) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (config->sharedMemBytes + kernel.static_shared > function.shared_limit) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned n = 0; n < config->numAttrs; ++n) {
        if (config->attrs[n].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            return CUDA_ERROR_INVALID_VALUE;
        if (stream.capture != nullptr && has_fault("no-early-graph")) return CUDA_ERROR_NOT_SUPPORTED;
        if (!kernel.waits) fail("%s is launched early and does not wait", kernel.name.c_str());
        if (!stream.behind_kernel)
            fail("%s is launched early, but not after a kernel of its stream", kernel.name.c_str());
    }
    // The kernel runs later, and so does its failure: the call returns without one.
    static int64_t before_failure = setting("DRIVER_FAILING_LAUNCH", 0);
    if (before_failure > 0 && --before_failure == 0) {
        is_lost = true;
        return CUDA_SUCCESS;
    }
    const uint8_t* given = static_cast<const uint8_t*>(parameters[0]);
    submit(config->hStream,
           [kernel = function.kernel, grid = std::to_array(grid), block = std::to_array(block),
            shared = config->sharedMemBytes, copied = std::vector<uint8_t>(given, given + kernel.parameter_bytes)] {
               run(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, copied);
           });
    stream.behind_kernel = true;
    return CUDA_SUCCESS;
}

// ---- Graphs --------------------------------------------------------------------------------------------------------

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode) {
    POLDER_DRIVER;
    Stream& stream = *stream_of(handle);
    if (stream.capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    stream.capture = std::make_shared<Graph>();
    stream.began_capture = true;
    stream.behind_kernel = false;
    stream.last.clear();
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    POLDER_DRIVER;
    Stream& stream = *stream_of(handle);
    *graph = nullptr;
    if (!stream.began_capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (has_fault("no-graph")) stream.last.clear();
    const std::shared_ptr<Graph> captured = stream.capture;
    captured->is_complete = true;
    // This stream must depend on every node.
    std::set<int> joined(stream.last.begin(), stream.last.end());
    for (auto n = joined.rbegin(); n != joined.rend(); ++n) {
        const std::vector<int>& after = captured->nodes[*n].after;
        joined.insert(after.begin(), after.end());
    }
    for (Stream* other : streams) {
        if (other->capture == captured) {
            other->capture = nullptr;
            other->began_capture = other->behind_kernel = false;
            other->last.clear();
        }
    }
    if (joined.size() != captured->nodes.size()) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    return *graph = reinterpret_cast<CUgraph>(new Graph(*captured)), CUDA_SUCCESS;
}
CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    POLDER_DRIVER;
    *count = reinterpret_cast<Graph*>(graph)->nodes.size();
    return nodes == nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    POLDER_DRIVER;
    auto made = new Executable{std::make_shared<Graph>(*reinterpret_cast<Graph*>(graph))};
    return *executable = reinterpret_cast<CUgraphExec>(made), CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    POLDER_DRIVER;
    Stream& stream = *stream_of(handle);
    if (stream.capture != nullptr) fail("a graph is launched in a capture");
    static const int64_t most_waiting = setting("DRIVER_MOST_GRAPHS", 0);
    const auto waiting =
        std::count_if(stream.items.begin(), stream.items.end(), [](const Item& item) { return item.graph != nullptr; });
    if (most_waiting > 0 && waiting >= most_waiting) fail("%d graphs wait already", int(waiting));
    const auto graph = reinterpret_cast<Executable*>(executable)->graph;
    const size_t nodes = graph->nodes.size();
    stream.items.push_back(
        {.work = {}, .waits_for = {}, .graph = graph, .done = std::vector<bool>(nodes), .left = nodes});
    stream.behind_kernel = false;
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) {
    POLDER_DRIVER;
    delete reinterpret_cast<Executable*>(executable);
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    POLDER_DRIVER;
    delete reinterpret_cast<Graph*>(graph);
    return CUDA_SUCCESS;
}

}  // extern "C"
