/* args.c: tensors and scalars from Python. DLPack by exchange table, versioned capsule, legacy capsule, in this order;
 * NumPy arrays by NumPy's own C API (numpy.c). */
#include "binding.h"
#include "dlpack.h"

#include <math.h>
#include <string.h>

static int fail(kvc_frame *frame) {
    frame->failed = true;
    return -1;
}

static int fail_text(kvc_frame *frame, PyObject *type, const char *name, const char *expected, const char *got) {
    PyErr_Format(type, "%s: %s: expected %s, got %s", frame->op, name, expected, got);
    return fail(frame);
}

static int fail_type(kvc_frame *frame, PyObject *object, const char *name, const char *expected) {
    PyObject *type = PyType_GetName(Py_TYPE(object)); /* not __name__, which a metaclass may make anything */
    if (type) PyErr_Format(PyExc_TypeError, "%s: %s: expected %s, got %U", frame->op, name, expected, type);
    Py_XDECREF(type);
    return fail(frame);
}

/* "op: name: expected ..., got str(object)"; an object's own __str__ may fail, and so do integers of many digits. */
static int fail_value(kvc_frame *frame, const char *name, const char *expected, PyObject *object) {
    PyObject *text = object ? PyObject_Str(object) : NULL;
    if (!text) {
        PyErr_Clear();
        text = PyUnicode_FromString("one without a text");
    }
    if (text) PyErr_Format(PyExc_ValueError, "%s: %s: expected %s%U", frame->op, name, expected, text);
    Py_XDECREF(text);
    return fail(frame);
}

static int fill(kvc_frame *frame, const char *name, const dl_tensor *in, bool read_only, kvc_tensor *out) {
    static const struct {
        uint8_t code, bits;
        kvc_dtype dtype;
    } known[] = {{2, 32, KVC_FLOAT32}, {2, 16, KVC_FLOAT16}, {4, 16, KVC_BFLOAT16},
                 {0, 32, KVC_INT32},   {0, 64, KVC_INT64},   {1, 8, KVC_UINT8},
                 {1, 32, KVC_UINT32},  {1, 64, KVC_UINT64},  {2, 64, KVC_FLOAT64}};
    if (in->ndim < 0 || in->ndim > KVC_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected at most %d dimensions, got %d", frame->op, name, KVC_MAX_DIMS,
                     in->ndim);
        return fail(frame);
    }
    size_t i = 0;
    while (i < sizeof known / sizeof *known && (known[i].code != in->dtype.code || known[i].bits != in->dtype.bits))
        i++;
    if (i == sizeof known / sizeof *known || in->dtype.lanes != 1) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s: expected a plain float or integer type, got DLPack type code %d of %d bits", frame->op,
                     name, in->dtype.code, in->dtype.bits);
        return fail(frame);
    }
    if (in->device.type != KVC_CPU && in->device.type != KVC_CUDA) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected a CPU or CUDA tensor, got DLPack device type %d", frame->op,
                     name, (int)in->device.type);
        return fail(frame);
    }
    *out = (kvc_tensor){.data = (char *)in->data + in->byte_offset,
                        .dtype = known[i].dtype,
                        .ndim = in->ndim,
                        .device = in->device.type,
                        .device_id = in->device.id,
                        .read_only = read_only};
    int64_t stride = 1, reach;
    for (int axis = in->ndim - 1; axis >= 0; axis--) {
        const int64_t size = in->shape[axis];
        out->shape[axis] = size;
        out->strides[axis] = in->strides ? in->strides[axis] : stride;
        if (size < 0 || __builtin_mul_overflow(stride, size > 1 ? size : 1, &stride) || stride > INT64_MAX / 16 ||
            (size > 1 && (__builtin_mul_overflow(size - 1, out->strides[axis], &reach) || reach > INT64_MAX / 128 ||
                          reach < -INT64_MAX / 128))) {
            PyErr_Format(PyExc_ValueError, "%s: %s: expected a shape that memory can hold, got %lld in dimension %d",
                         frame->op, name, (long long)size, axis);
            return fail(frame);
        }
    }
    if (!out->data && kvc_elements(out) != 0) /* a stand-in, as compilers trace with */
        return fail_text(frame, PyExc_ValueError, name, "a tensor with memory", "a null address");
    if ((uintptr_t)out->data % (uintptr_t)kvc_dtype_size(out->dtype) != 0) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected aligned elements, got address %p", frame->op, name, out->data);
        return fail(frame);
    }
    return 0;
}

/* ---- exchange table: looked up once per type */

#define CACHED_TYPES 8
static struct {
    PyTypeObject *type; /* a strong reference: types met here are few and long-lived */
    const dl_exchange *table;
} cache[CACHED_TYPES];

static const dl_exchange *known_table(const PyTypeObject *type) {
    for (int slot = 0; slot < CACHED_TYPES && cache[slot].type; slot++)
        if (cache[slot].type == type) return cache[slot].table;
    return NULL;
}

/* Of a type that is not known yet. */
static const dl_exchange *exchange_table(PyTypeObject *type) {
    const dl_exchange *table = NULL;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        while (table && table->version.major != 1) table = table->previous;
        if (table && !table->tensor_from_object) table = NULL;
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    int slot = 0;
    while (slot < CACHED_TYPES && cache[slot].type) slot++;
    if (slot < CACHED_TYPES && table) {
        Py_INCREF((PyObject *)type);
        cache[slot].type = type;
        cache[slot].table = table;
    }
    return table;
}

/* ---- capsules */

static int from_capsule(kvc_frame *frame, PyObject *object, const char *name, kvc_tensor *out, kvc_held *held) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method) {
        PyErr_Clear();
        return fail_type(frame, object, name, "a NumPy array or a DLPack tensor");
    }
    long device = KVC_CPU;
    PyObject *where = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (where && PyTuple_Check(where) && PyTuple_Size(where) == 2) {
        PyObject *number = PyNumber_Long(PyTuple_GetItem(where, 0));
        device = number ? PyLong_AsLong(number) : -1;
        Py_XDECREF(number);
    }
    Py_XDECREF(where);
    PyErr_Clear();
    /* CUDA: stream 1, the legacy default stream, which is the one a NULL stream launches on. */
    PyObject *arguments = device == KVC_CUDA ? Py_BuildValue("{s:i,s:(ii)}", "stream", 1, "max_version", 1, 0)
                                             : Py_BuildValue("{s:(ii)}", "max_version", 1, 0);
    PyObject *nothing = PyTuple_New(0);
    PyObject *capsule = arguments && nothing ? PyObject_Call(method, nothing, arguments) : NULL;
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* older than max_version */
        PyErr_Clear();
        if (arguments && PyDict_DelItemString(arguments, "max_version") == 0)
            capsule = PyObject_Call(method, nothing, arguments);
    }
    Py_XDECREF(arguments);
    Py_XDECREF(nothing);
    Py_DECREF(method);
    if (!capsule) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        fail_value(frame, name, "an exportable tensor, got a DLPack error: ", value);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return -1;
    }
    int result;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        PyCapsule_SetName(capsule, "used_dltensor_versioned");
        held->managed = managed;
        held->versioned = 1;
        result = managed->version.major == 1
                     ? fill(frame, name, &managed->tensor, managed->flags & DL_READ_ONLY, out)
                     : fail_text(frame, PyExc_ValueError, name, "DLPack 1.x", "another major version");
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        PyCapsule_SetName(capsule, "used_dltensor");
        held->managed = managed;
        held->versioned = 0;
        result = fill(frame, name, &managed->tensor, false, out);
    } else {
        result = fail_text(frame, PyExc_ValueError, name, "a DLPack capsule", "another object from __dlpack__()");
    }
    Py_DECREF(capsule);
    return result;
}

int frame_tensor(kvc_frame *frame, PyObject *object, const char *name, int mode, kvc_tensor *out) {
    memset(out, 0, sizeof *out);
    if (object == Py_None) {
        if (mode & FRAME_OPTIONAL) return 0;
        return fail_text(frame, PyExc_TypeError, name, "a tensor", "None");
    }
    kvc_held *held = &frame->held[frame->count];
    *held = (kvc_held){0};
    const dl_exchange *table = known_table(Py_TYPE(object));
    int found = table ? 1 : arena_tensor(object, out);
    if (found == 1 && !table) found = numpy_tensor(frame, object, name, out);
    if (found < 0) return fail(frame);
    if (found == 1) {
        if (!table) table = exchange_table(Py_TYPE(object));
        dl_tensor view;
        if (table && table->tensor_from_object(object, &view) == 0) {
            if (fill(frame, name, &view, false, out)) return -1;
            if (out->device == KVC_CUDA && !frame->streamed && table->current_stream) {
                if (table->current_stream(out->device, out->device_id, &frame->stream) != 0) return fail(frame);
                frame->streamed = true;
            }
        } else {
            PyErr_Clear(); /* the capsule's error says why */
            const int result = from_capsule(frame, object, name, out, held);
            if (result) {
                frame->tensors[frame->count] = out;
                frame->names[frame->count] = name;
                frame->modes[frame->count++] = mode; /* so that frame_return lets the capsule's memory go */
                return -1;
            }
        }
    }
    Py_INCREF(object);
    held->object = object;
    frame->tensors[frame->count] = out;
    frame->names[frame->count] = name;
    frame->modes[frame->count++] = mode;
    if ((mode & FRAME_OUT) && out->read_only)
        return fail_text(frame, PyExc_ValueError, name, "a writable tensor", "a read-only one");
    return 0;
}

int frame_int(kvc_frame *frame, PyObject *object, const char *name, int64_t low, int64_t high, int64_t *out) {
    PyObject *index = PyNumber_Index(object);
    if (!index) {
        PyErr_Clear();
        return fail_type(frame, object, name, "an integer");
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    if (overflow || value < low || value > high) {
        char expected[96];
        PyOS_snprintf(expected, sizeof expected, "an integer in %lld..%lld, got ", (long long)low, (long long)high);
        fail_value(frame, name, expected, index);
        Py_DECREF(index);
        return -1;
    }
    Py_DECREF(index);
    *out = value;
    return 0;
}

int frame_int32(kvc_frame *frame, PyObject *object, const char *name, int64_t low, int64_t high, int32_t *out) {
    int64_t value;
    if (frame_int(frame, object, name, low, high, &value)) return -1;
    *out = (int32_t)value;
    return 0;
}

int frame_double(kvc_frame *frame, PyObject *object, const char *name, double low, double high, double *out) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return fail_type(frame, object, name, "a number");
    }
    if (!(value >= low && value <= high)) {
        char expected[96];
        PyOS_snprintf(expected, sizeof expected, "a number in %g..%g, got ", low, high);
        return fail_value(frame, name, expected, object);
    }
    *out = value;
    return 0;
}

int frame_float(kvc_frame *frame, PyObject *object, const char *name, double low, double high, float *out) {
    double value;
    if (frame_double(frame, object, name, low, high, &value)) return -1;
    *out = (float)value;
    return 0;
}

int frame_layout(kvc_frame *frame, PyObject *object, kvc_layout *out) {
    if (!PyTuple_Check(object) || PyTuple_Size(object) != 5)
        return fail_type(frame, object, "layout", "a tuple (head_dim, group, zero_point, half, scale_dtype)");
    int32_t *fields[] = {&out->head_dim, &out->group, &out->zero_point, &out->half, &out->scale_dtype};
    for (Py_ssize_t i = 0; i < 5; i++)
        if (frame_int32(frame, PyTuple_GetItem(object, i), "layout", 0, 1 << 20, fields[i])) return -1;
    const kvc_status status = kvc_expect_layout(frame->op, out);
    if (status != KVC_OK) {
        raise_status(status);
        return fail(frame);
    }
    return 0;
}

int frame_count(kvc_frame *frame, Py_ssize_t got, Py_ssize_t want) {
    if (got == want) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd positional arguments, got %zd", frame->op, want, got);
    return fail(frame);
}

/* ---- one device, no overlap */

/* Addresses of a tensor's memory; both NULL where it has no elements. */
typedef struct {
    const char *low, *high;
} byte_range;

static byte_range range_of(const kvc_tensor *tensor) {
    int64_t first = 0, last = 0;
    for (int axis = 0; axis < tensor->ndim; axis++) {
        if (tensor->shape[axis] == 0) return (byte_range){NULL, NULL};
        const int64_t reach = (tensor->shape[axis] - 1) * tensor->strides[axis];
        if (reach < 0)
            first += reach;
        else
            last += reach;
    }
    const int64_t size = kvc_dtype_size(tensor->dtype);
    return (byte_range){(const char *)tensor->data + first * size, (const char *)tensor->data + (last + 1) * size};
}

int frame_check(kvc_frame *frame) {
    byte_range ranges[FRAME_MAX];
    for (int i = 0; i < frame->count; i++) {
        const kvc_tensor *tensor = frame->tensors[i], *first = frame->tensors[0];
        ranges[i] = range_of(tensor);
        if (tensor->device == KVC_CUDA && !(frame->modes[i] & FRAME_CUDA)) {
            PyErr_Format(PyExc_ValueError, "%s: %s: expected a CPU tensor, got one on cuda:%d", frame->op,
                         frame->names[i], tensor->device_id);
            return fail(frame);
        }
        if (!(frame->modes[i] & FRAME_ANYWHERE) &&
            (tensor->device != first->device || tensor->device_id != first->device_id)) {
            PyErr_Format(PyExc_ValueError, "%s: %s: expected the device of %s (%s:%d), got %s:%d", frame->op,
                         frame->names[i], frame->names[0], first->device == KVC_CUDA ? "cuda" : "cpu", first->device_id,
                         tensor->device == KVC_CUDA ? "cuda" : "cpu", tensor->device_id);
            return fail(frame);
        }
    }
    for (int i = 0; i < frame->count; i++) {
        const kvc_tensor *tensor = frame->tensors[i];
        if (!(frame->modes[i] & FRAME_OUT) || !ranges[i].high) continue;
        for (int axis = 0; axis < tensor->ndim; axis++)
            if (tensor->shape[axis] > 1 && tensor->strides[axis] == 0)
                return fail_text(frame, PyExc_ValueError, frame->names[i], "an output whose elements are distinct",
                                 "a broadcast one (a stride of 0)");
        for (int j = 0; j < frame->count; j++) {
            if (j == i || ranges[i].low >= ranges[j].high || ranges[j].low >= ranges[i].high) continue;
            PyErr_Format(PyExc_ValueError, "%s: %s: expected memory of its own, got an overlap with %s", frame->op,
                         frame->names[i], frame->names[j]);
            return fail(frame);
        }
    }
    return 0;
}

const kvc_backend *frame_backend(kvc_frame *frame) {
    const char *why = NULL;
    const kvc_backend *backend = kvc_cuda(&why);
    if (!backend) {
        kvc_fail(KVC_ENODEV, "%s: expected CUDA to be usable: %s", frame->op, why);
        raise_status(KVC_ENODEV);
        frame->failed = true;
    }
    return backend;
}

kvc_device frame_device(const kvc_frame *frame) { return frame->count ? frame->tensors[0]->device : KVC_CPU; }

PyObject *frame_return(kvc_frame *frame) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace); /* what runs here may be Python, which must not find an exception set */
    for (int i = 0; i < frame->count; i++) {
        kvc_held *held = &frame->held[i];
        if (held->managed && held->versioned) {
            dl_managed_versioned *managed = held->managed;
            if (managed->deleter) managed->deleter(managed);
        } else if (held->managed) {
            dl_managed *managed = held->managed;
            if (managed->deleter) managed->deleter(managed);
        }
        Py_XDECREF(held->object);
    }
    PyErr_Restore(type, value, trace);
    if (frame->failed) return NULL;
    Py_RETURN_NONE;
}
