/* module.c: kvcomp._C. */
#include "binding.h"
#include "cpu/attend_tile.h"

static PyObject *set_threads(PyObject *module, PyObject *number) {
    (void)module;
    kvc_frame frame = {.op = "set_threads"};
    int32_t threads;
    if (frame_int32(&frame, number, "threads", 1, 64, &threads)) return NULL;
    kvc_set_threads(threads);
    Py_RETURN_NONE;
}

static PyObject *threads(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyLong_FromLong(kvc_threads());
}

static PyObject *simd(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(kvc_attend_tiles()->name);
}

/* {"available": bool, "why": str | None, "architectures": str | None, "runtime": int, "driver": int,
 *  "devices": [(name, compute capability)]} */
static PyObject *cuda_info(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    const char *why = NULL;
    const kvc_backend *backend = kvc_cuda(&why);
    const int count = backend ? backend->device_count(&why) : 0;
    PyObject *devices = PyList_New(0);
    if (!devices) return NULL;
    for (int i = 0; i < count; i++) {
        int capability = 0;
        const char *name = backend->device_name(i, &capability);
        PyObject *device = Py_BuildValue("(si)", name, capability);
        if (!device || PyList_Append(devices, device)) {
            Py_XDECREF(device);
            Py_DECREF(devices);
            return NULL;
        }
        Py_DECREF(device);
    }
    return Py_BuildValue("{s:N,s:z,s:z,s:i,s:i,s:N}", "available", PyBool_FromLong(count > 0), "why",
                         count > 0 ? NULL : why, "architectures", backend ? backend->architectures : NULL, "runtime",
                         backend ? backend->runtime_version() : 0, "driver", backend ? backend->driver_version() : 0,
                         "devices", devices);
}

PyMethodDef module_methods[] = {
    {"set_threads", set_threads, METH_O, "set_threads(threads, /)\n--\n\nThreads of the CPU operations, 1..64."},
    {"threads", threads, METH_NOARGS, "threads()\n--\n\nThreads of the CPU operations."},
    {"simd", simd, METH_NOARGS,
     "simd()\n--\n\nThe instruction set of the attention kernels in use: base, avx2, avx512."},
    {"cuda_info", cuda_info, METH_NOARGS,
     "cuda_info()\n--\n\nWhat the CUDA library is and can use, or why it cannot be used."},
    {0}};

/* The folder of the extension, where libkvcomp_cuda.so lies too. */
static int remember_directory(PyObject *module) {
    PyObject *spec = PyObject_GetAttrString(module, "__spec__");
    PyObject *origin = spec ? PyObject_GetAttrString(spec, "origin") : NULL;
    Py_XDECREF(spec);
    PyObject *bytes = origin && PyUnicode_Check(origin) ? PyUnicode_AsUTF8String(origin) : NULL;
    Py_XDECREF(origin);
    PyErr_Clear();
    if (!bytes) return 0;
    char *path = PyBytes_AsString(bytes);
    char *slash = NULL;
    for (char *at = path; *at; at++)
        if (*at == '/') slash = at;
    if (slash) *slash = 0;
    kvc_cuda_set_directory(slash ? path : ".");
    Py_DECREF(bytes);
    return 0;
}

static int execute(PyObject *module) {
    if (numpy_import() < 0) return -1;
    if (raise_init(module) || arena_init(module) || remember_directory(module)) return -1;
    if (PyModule_AddFunctions(module, module_methods) || PyModule_AddFunctions(module, ops_cache_methods) ||
        PyModule_AddFunctions(module, ops_policy_methods) || PyModule_AddFunctions(module, ops_bsr_methods) ||
        PyModule_AddFunctions(module, ops_w4_methods))
        return -1;
    if (PyModule_AddIntConstant(module, "FORMAT_VERSION", KVC_FORMAT_VERSION) ||
        PyModule_AddIntConstant(module, "BSR_WORKSPACE", KVC_BSR_WORKSPACE))
        return -1;
    return PyModule_AddStringConstant(module, "VERSION", KVC_VERSION);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "kvcomp._C", .m_size = 0, .m_slots = slots,
                                 .m_doc = "Packed KV caches in C. Contracts: csrc/kvcomp/*.h."};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
