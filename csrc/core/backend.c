/* backend.c: finds libkvcomp_cuda.so beside the extension module, once, and keeps the answer. Loading it touches no
 * driver and no device: that begins with device_count() or the first launch. */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/core.h"
#include "kvcomp/backend.h"

#define LIBRARY "libkvcomp_cuda.so"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char folder[4096];
static const kvc_backend *backend; /* written inside `once` only, as is the reason */
static char reason[5120];

void kvc_cuda_set_directory(const char *directory) { snprintf(folder, sizeof folder, "%s", directory); }

static void load(void) {
    char path[sizeof folder + sizeof LIBRARY + 1];
    snprintf(path, sizeof path, "%s/%s", folder, LIBRARY);
    if (folder[0] == '\0' || access(path, F_OK) != 0) {
        snprintf(reason, sizeof reason, "cuda: library: expected %s beside the extension module, got %s", LIBRARY,
                 folder[0] == '\0' || errno == ENOENT ? "a build without CUDA (no nvcc was found, or KVCOMP_CUDA=OFF)"
                                                      : strerror(errno));
        return;
    }
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        snprintf(reason, sizeof reason, "cuda: library: expected a loadable %s, got: %s", LIBRARY, dlerror());
        return;
    }
    kvc_backend_fn *get;
    *(void **)&get = dlsym(handle, "kvc_cuda_backend");
    const kvc_backend *found = get ? get() : NULL;
    if (!found) {
        snprintf(reason, sizeof reason, "cuda: library: expected %s to export kvc_cuda_backend, got another library",
                 path);
    } else if (found->api_version != KVC_BACKEND_API || found->format_version != KVC_FORMAT_VERSION) {
        snprintf(reason, sizeof reason,
                 "cuda: library: expected interface %d and page format %d in %s, got %u and %u: build kvcomp again",
                 KVC_BACKEND_API, KVC_FORMAT_VERSION, path, found->api_version, found->format_version);
    } else {
        backend = found;
        return; /* stays loaded for the life of the process */
    }
    dlclose(handle);
}

const kvc_backend *kvc_cuda(const char **why) {
    pthread_once(&once, load);
    if (why) *why = backend ? NULL : reason;
    return backend;
}
