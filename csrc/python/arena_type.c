/* arena_type.c: kvcomp._C.Arena. */
#include "binding.h"
#include "core/arena.h"

#include <string.h>

typedef struct {
    PyObject_HEAD kvc_arena *arena;
} ArenaObject;

static PyTypeObject *arena_type;

static PyObject *arena_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    kvc_frame frame = {.op = "arena"};
    static char *names[] = {"reserve_bytes", "device", NULL};
    PyObject *reserve_bytes = NULL, *where = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|OO", names, &reserve_bytes, &where)) {
        PyErr_Clear();
        PyErr_SetString(PyExc_TypeError, "arena: expected reserve_bytes and device at most");
        return NULL;
    }
    int64_t bytes = 0;
    int32_t device = -1;
    if ((reserve_bytes && reserve_bytes != Py_None &&
         frame_int(&frame, reserve_bytes, "reserve_bytes", 1, INT64_MAX, &bytes)) ||
        (where && frame_int32(&frame, where, "device", -1, INT32_MAX, &device)))
        return NULL;
    kvc_arena *arena;
    const kvc_status status = kvc_arena_create(bytes, device, &arena);
    if (status != KVC_OK) return raise_status(status);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    ArenaObject *self = (ArenaObject *)allocate(type, 0);
    if (!self) {
        kvc_arena_destroy(arena);
        return NULL;
    }
    self->arena = arena;
    return (PyObject *)self;
}

static void arena_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    kvc_arena_destroy(((ArenaObject *)self)->arena);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *finish(kvc_frame *frame, kvc_status status) {
    if (status != KVC_OK) {
        raise_status(status);
        frame->failed = true;
    }
    return frame_return(frame);
}

static PyObject *arena_alloc(PyObject *self, PyObject *const *argv, Py_ssize_t argc) {
    kvc_frame frame = {.op = "arena"};
    int64_t page_bytes, count;
    uint32_t *units;
    if (frame_count(&frame, argc, 2) || frame_int(&frame, argv[0], "page_bytes", 1, INT32_MAX, &page_bytes) ||
        frame_int(&frame, argv[1], "count", 0, INT32_MAX, &count))
        return NULL;
    kvc_arena *arena = ((ArenaObject *)self)->arena;
    if (count > kvc_arena_reserved(arena) / page_bytes) /* refused, before an array of so many units is made */
        return raise_status(kvc_arena_alloc(arena, page_bytes, count, NULL));
    PyObject *array = numpy_uint32((Py_ssize_t)count, &units);
    if (!array) return NULL;
    const kvc_status status = kvc_arena_alloc(arena, page_bytes, count, units);
    if (status != KVC_OK) {
        Py_DECREF(array);
        return raise_status(status);
    }
    return array;
}

static PyObject *arena_free(PyObject *self, PyObject *const *argv, Py_ssize_t argc) {
    kvc_frame frame = {.op = "arena"};
    int64_t page_bytes;
    kvc_tensor units;
    if (frame_count(&frame, argc, 2) || frame_int(&frame, argv[0], "page_bytes", 1, INT32_MAX, &page_bytes) ||
        frame_tensor(&frame, argv[1], "units", FRAME_IN, &units) || frame_check(&frame))
        return frame_return(&frame);
    kvc_status status = kvc_expect_array("arena", "units", &units, KVC_UINT32, 1, (int64_t[]){-1});
    if (status == KVC_OK) status = kvc_arena_free(((ArenaObject *)self)->arena, page_bytes, units.shape[0], units.data);
    return finish(&frame, status);
}

/* ---- copy, read, write: pages, one by one, by way of a buffer of copies */

#define COPIES 256
typedef struct {
    const kvc_arena *arena;
    int64_t count;
    bool wait;
    kvc_stream stream;
    kvc_copy copies[COPIES];
} copier;

static kvc_status flush(copier *c) {
    kvc_status status = KVC_OK;
    if (c->count) {
        Py_BEGIN_ALLOW_THREADS status = kvc_arena_copy(c->arena, c->count, c->copies, c->wait, c->stream);
        Py_END_ALLOW_THREADS
    }
    c->count = 0;
    return status;
}

static kvc_status add_copy(copier *c, char *to, const char *from, int64_t bytes) {
    if (to == from) return KVC_OK;
    kvc_copy *last = c->count ? &c->copies[c->count - 1] : NULL;
    const bool follows = last && (char *)last->to + last->bytes == to && (const char *)last->from + last->bytes == from;
    const int64_t distance = to > from ? to - from : from - to;
    if (follows && distance >= last->bytes + bytes) {
        last->bytes += bytes;
        return KVC_OK;
    }
    if (c->count == COPIES) KVC_TRY(flush(c));
    c->copies[c->count++] = (kvc_copy){to, from, bytes};
    return KVC_OK;
}

static char *page_at(const kvc_arena *arena, uint32_t unit) {
    return (char *)kvc_arena_base(arena) + (int64_t)unit * KVC_UNIT;
}

static kvc_status check_live(const kvc_arena *arena, const char *name, int64_t page_bytes, const kvc_tensor *units) {
    for (int64_t j = 0; j < units->shape[0]; j++) {
        const uint32_t unit = ((const uint32_t *)units->data)[j];
        KVC_CHECK(kvc_arena_live(arena, page_bytes, unit), KVC_EINVAL,
                  "arena: %s: expected live pages of %lld bytes, got unit %u", name, (long long)page_bytes, unit);
    }
    return KVC_OK;
}

static PyObject *arena_copy(PyObject *self, PyObject *const *argv, Py_ssize_t argc) {
    kvc_frame frame = {.op = "arena"};
    const kvc_arena *arena = ((ArenaObject *)self)->arena;
    int64_t page_bytes;
    kvc_tensor units[2];
    if (frame_count(&frame, argc, 3) || frame_int(&frame, argv[0], "page_bytes", 1, INT32_MAX, &page_bytes) ||
        frame_tensor(&frame, argv[1], "source", FRAME_IN, &units[0]) ||
        frame_tensor(&frame, argv[2], "target", FRAME_IN, &units[1]) || frame_check(&frame))
        return frame_return(&frame);
    kvc_status status = KVC_OK;
    for (int i = 0; i < 2 && status == KVC_OK; i++) {
        const char *name = i ? "target" : "source";
        status = kvc_expect_array("arena", name, &units[i], KVC_UINT32, 1, units[0].shape);
        if (status == KVC_OK) status = check_live(arena, name, page_bytes, &units[i]);
    }
    copier c = {.arena = arena, .wait = true};
    for (int64_t j = 0; status == KVC_OK && j < units[0].shape[0]; j++)
        status = add_copy(&c, page_at(arena, ((const uint32_t *)units[1].data)[j]),
                          page_at(arena, ((const uint32_t *)units[0].data)[j]), page_bytes);
    if (status == KVC_OK) status = flush(&c);
    return finish(&frame, status);
}

static PyObject *arena_compact(PyObject *self, PyObject *const *argv, Py_ssize_t argc) {
    kvc_frame frame = {.op = "arena"};
    int64_t page_bytes;
    kvc_tensor units;
    if (frame_count(&frame, argc, 2) || frame_int(&frame, argv[0], "page_bytes", 1, INT32_MAX, &page_bytes) ||
        frame_tensor(&frame, argv[1], "units", FRAME_INOUT, &units) || frame_check(&frame))
        return frame_return(&frame);
    kvc_status status = kvc_expect_array("arena", "units", &units, KVC_UINT32, 1, (int64_t[]){-1});
    if (status == KVC_OK)
        status = kvc_arena_compact(((ArenaObject *)self)->arena, page_bytes, units.shape[0], units.data);
    return finish(&frame, status);
}

/* Where the rows of read and write lie: on the CPU, or on the arena's device. */
static kvc_status check_device(const kvc_arena *arena, const kvc_tensor *bytes) {
    const int device = kvc_arena_device(arena);
    KVC_CHECK(bytes->device == KVC_CPU || device >= 0, KVC_EDEVICE, "arena: bytes: expected a CPU tensor, got cuda:%d",
              bytes->device_id);
    KVC_CHECK(bytes->device == KVC_CPU || bytes->device_id == device, KVC_EDEVICE,
              "arena: bytes: expected a tensor on the CPU or cuda:%d, got cuda:%d", device, bytes->device_id);
    return KVC_OK;
}

/* read and write: whole live pages out of and into (n, page_bytes) uint8, one after the other. */
static PyObject *arena_move(PyObject *self, PyObject *const *argv, Py_ssize_t argc, bool into) {
    kvc_frame frame = {.op = "arena"};
    const kvc_arena *arena = ((ArenaObject *)self)->arena;
    int64_t page_bytes;
    kvc_tensor units, bytes;
    if (frame_count(&frame, argc, 3) || frame_int(&frame, argv[0], "page_bytes", 1, INT32_MAX, &page_bytes) ||
        frame_tensor(&frame, argv[1], "units", FRAME_IN, &units) ||
        frame_tensor(&frame, argv[2], "bytes", (into ? FRAME_IN : FRAME_OUT) | FRAME_CUDA | FRAME_ANYWHERE, &bytes) ||
        frame_check(&frame))
        return frame_return(&frame);
    kvc_status status = kvc_expect_array("arena", "units", &units, KVC_UINT32, 1, (int64_t[]){-1});
    if (status == KVC_OK)
        status = kvc_expect_array("arena", "bytes", &bytes, KVC_UINT8, 2, (int64_t[]){units.shape[0], page_bytes});
    if (status == KVC_OK) status = check_device(arena, &bytes);
    if (status == KVC_OK) status = check_live(arena, "units", page_bytes, &units);
    copier c = {.arena = arena, .wait = bytes.device == KVC_CPU, .stream = frame.stream};
    for (int64_t j = 0; status == KVC_OK && j < units.shape[0]; j++) {
        char *page = page_at(arena, ((const uint32_t *)units.data)[j]), *row = (char *)bytes.data + j * page_bytes;
        status = add_copy(&c, into ? page : row, into ? row : page, page_bytes);
    }
    if (status == KVC_OK) status = flush(&c);
    return finish(&frame, status);
}

static PyObject *arena_read(PyObject *self, PyObject *const *argv, Py_ssize_t argc) {
    return arena_move(self, argv, argc, false);
}

static PyObject *arena_write(PyObject *self, PyObject *const *argv, Py_ssize_t argc) {
    return arena_move(self, argv, argc, true);
}

static PyObject *arena_device(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(kvc_arena_device(((ArenaObject *)self)->arena));
}

static PyObject *arena_nbytes(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(kvc_arena_nbytes(((ArenaObject *)self)->arena));
}

static PyObject *arena_used(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(kvc_arena_used(((ArenaObject *)self)->arena));
}

int arena_tensor(PyObject *object, kvc_tensor *out) {
    if (!PyObject_TypeCheck(object, arena_type)) return 1;
    const kvc_arena *arena = ((ArenaObject *)object)->arena;
    const int device = kvc_arena_device(arena);
    *out = (kvc_tensor){.data = kvc_arena_base(arena),
                        .dtype = KVC_UINT8,
                        .ndim = 1,
                        .device = device < 0 ? KVC_CPU : KVC_CUDA,
                        .device_id = device < 0 ? 0 : device,
                        .shape = {kvc_arena_reserved(arena)},
                        .strides = {1}};
    return 0;
}

static PyMethodDef methods[] = {
    {"alloc", (PyCFunction)(void *)arena_alloc, METH_FASTCALL,
     "alloc($self, page_bytes, count, /)\n--\n\nUnits (n,) uint32 of `count` new pages of `page_bytes` bytes."},
    {"free", (PyCFunction)(void *)arena_free, METH_FASTCALL,
     "free($self, page_bytes, units, /)\n--\n\nGives pages back; empty slabs return to the system."},
    {"copy", (PyCFunction)(void *)arena_copy, METH_FASTCALL,
     "copy($self, page_bytes, source, target, /)\n--\n\nCopies live pages, units (n,) uint32 each, one after the "
     "other."},
    {"read", (PyCFunction)(void *)arena_read, METH_FASTCALL,
     "read($self, page_bytes, units, bytes, /)\n--\n\nCopies live pages, units (n,) uint32, to bytes (n, page_bytes) "
     "uint8."},
    {"write", (PyCFunction)(void *)arena_write, METH_FASTCALL,
     "write($self, page_bytes, units, bytes, /)\n--\n\nCopies bytes (n, page_bytes) uint8 to live pages, units (n,) "
     "uint32."},
    {"compact", (PyCFunction)(void *)arena_compact, METH_FASTCALL,
     "compact($self, page_bytes, units, /)\n--\n\nMoves all live pages of this size together and gives back what "
     "they leave; units (n,) uint32 of all of them: in, where they are, out, where they went."},
    {0}};

static PyGetSetDef properties[] = {{"device", arena_device, NULL, "The CUDA device's number; -1: the CPU.", NULL},
                                   {"nbytes", arena_nbytes, NULL, "Bytes of memory that are taken.", NULL},
                                   {"used", arena_used, NULL, "Bytes of live pages.", NULL},
                                   {0}};

int arena_init(PyObject *module) {
    PyType_Slot slots[] = {
        {Py_tp_new, arena_new},
        {Py_tp_dealloc, arena_dealloc},
        {Py_tp_methods, methods},
        {Py_tp_getset, properties},
        {Py_tp_doc, "Arena(reserve_bytes=None, device=-1)\n--\n\nPage memory on the CPU or, device >= 0, on that "
                    "CUDA device: address space reserved once (64 GiB, or twice the device's memory), slabs "
                    "committed as pages are asked for and given back when empty."},
        {0, NULL}};
    PyType_Spec spec = {"kvcomp._C.Arena", sizeof(ArenaObject), 0, Py_TPFLAGS_DEFAULT, slots};
    arena_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return arena_type ? PyModule_AddObjectRef(module, "Arena", (PyObject *)arena_type) : -1;
}
