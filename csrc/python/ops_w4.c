/* ops_w4.c: w4_bytes, w4_scales, w4_pack, w4_unpack, w4_matmul, w4_workspace. */
#include "binding.h"

#define FUNCTION(name) static PyObject *name(PyObject *module, PyObject *const *argv, Py_ssize_t argc)

static int shape_group(kvc_frame *frame, PyObject *const *argv, kvc_w4_shape *shape) {
    return frame_int32(frame, argv[0], "group", 32, 128, &shape->group) ||
           frame_int32(frame, argv[1], "scale_bits", -1, KVC_W4_MOST_SCALE_BITS, &shape->scale_bits);
}

static int shape_exponent(kvc_frame *frame, PyObject *object, kvc_w4_shape *shape) {
    return frame_int32(frame, object, "exponent", -KVC_W4_MOST_EXPONENT, KVC_W4_MOST_EXPONENT, &shape->exponent);
}

/* One exponent, or a (rows, exponent) for each of several stacked matrices. */
static int matmul_exponents(kvc_frame *frame, PyObject *object, kvc_w4_matmul_args *args) {
    if (!PyTuple_Check(object)) return shape_exponent(frame, object, &args->shape);
    const Py_ssize_t count = PyTuple_Size(object);
    bool pairs = count >= 1 && count <= KVC_W4_MOST_PARTS;
    for (Py_ssize_t i = 0; pairs && i < count; i++) {
        PyObject *const pair = PyTuple_GetItem(object, i);
        pairs = PyTuple_Check(pair) && PyTuple_Size(pair) == 2;
    }
    if (!pairs) {
        PyErr_Format(PyExc_ValueError,
                     "w4_matmul: exponent: expected an integer or 1 to %d pairs (rows, exponent), got %R",
                     KVC_W4_MOST_PARTS, object);
        frame->failed = true;
        return -1;
    }
    args->part_count = (int32_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *const pair = PyTuple_GetItem(object, i);
        kvc_w4_shape shape = {0};
        if (frame_int(frame, PyTuple_GetItem(pair, 0), "rows", 0, INT64_MAX - 1024, &args->parts[i].n) ||
            shape_exponent(frame, PyTuple_GetItem(pair, 1), &shape))
            return -1;
        args->parts[i].exponent = shape.exponent;
    }
    return 0;
}

/* A matrix's last two axes; what is no matrix is refused by the operation. */
static void shape_of(kvc_w4_shape *shape, const kvc_tensor *weights) {
    shape->n = weights->ndim == 2 ? weights->shape[0] : 0;
    shape->k = weights->ndim == 2 ? weights->shape[1] : 0;
}

FUNCTION(w4_bytes) {
    (void)module;
    kvc_frame frame = {.op = "w4_bytes"};
    kvc_w4_shape shape = {0};
    if (frame_count(&frame, argc, 4) || frame_int(&frame, argv[0], "n", 0, INT64_MAX - 1024, &shape.n) ||
        frame_int(&frame, argv[1], "k", 0, INT64_MAX - 1024, &shape.k) || shape_group(&frame, argv + 2, &shape))
        return NULL;
    const kvc_status status = kvc_w4_shape_check("w4_bytes", &shape);
    if (status != KVC_OK) return raise_status(status);
    return PyLong_FromLongLong(kvc_w4_bytes(shape.n, shape.k, shape.group, shape.scale_bits));
}

FUNCTION(w4_scales) {
    (void)module;
    kvc_frame frame = {.op = "w4_scales"};
    kvc_w4_scales_args args = {0};
    if (frame_count(&frame, argc, 5) || frame_tensor(&frame, argv[0], "out", FRAME_OUT, &args.out) ||
        frame_tensor(&frame, argv[1], "scales", FRAME_IN, &args.scales) ||
        frame_int32(&frame, argv[2], "scale_bits", -1, KVC_W4_MOST_ROUNDED_BITS, &args.scale_bits) ||
        frame_int32(&frame, argv[3], "exponent", -KVC_W4_MOST_EXPONENT, KVC_W4_MOST_EXPONENT, &args.exponent) ||
        frame_int32(&frame, argv[4], "rounding", KVC_W4_FLOOR, KVC_W4_NEAREST, &args.rounding) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_w4_scales(&args));
    return frame_return(&frame);
}

FUNCTION(w4_pack) {
    (void)module;
    kvc_frame frame = {.op = "w4_pack"};
    int32_t exponent = KVC_W4_AUTO;
    kvc_w4_pack_args args = {.shape.exponent = KVC_W4_AUTO, .exponent = &exponent};
    if (frame_count(&frame, argc, 7) || frame_tensor(&frame, argv[0], "packed", FRAME_OUT, &args.packed) ||
        frame_tensor(&frame, argv[1], "weights", FRAME_IN, &args.weights) ||
        shape_group(&frame, argv + 2, &args.shape) ||
        (argv[4] != Py_None && shape_exponent(&frame, argv[4], &args.shape)) ||
        frame_int32(&frame, argv[5], "rounding", KVC_W4_FLOOR, KVC_W4_SEARCH, &args.rounding) ||
        frame_int32(&frame, argv[6], "threads", 0, 64, &args.threads) || frame_check(&frame))
        return frame_return(&frame);
    shape_of(&args.shape, &args.weights);
    FRAME_RUN(&frame, kvc_w4_pack(&args));
    PyObject *done = frame_return(&frame);
    if (!done) return NULL;
    Py_DECREF(done);
    return PyLong_FromLong(exponent);
}

FUNCTION(w4_unpack) {
    (void)module;
    kvc_frame frame = {.op = "w4_unpack"};
    kvc_w4_unpack_args args = {0};
    if (frame_count(&frame, argc, 10) || frame_tensor(&frame, argv[0], "out", FRAME_OUT | FRAME_OPTIONAL, &args.out) ||
        frame_tensor(&frame, argv[1], "codes", FRAME_OUT | FRAME_OPTIONAL, &args.codes) ||
        frame_tensor(&frame, argv[2], "scales", FRAME_OUT | FRAME_OPTIONAL, &args.scales) ||
        frame_tensor(&frame, argv[3], "packed", FRAME_IN, &args.packed) ||
        frame_int(&frame, argv[4], "n", 0, INT64_MAX - 1024, &args.shape.n) ||
        frame_int(&frame, argv[5], "k", 0, INT64_MAX - 1024, &args.shape.k) ||
        shape_group(&frame, argv + 6, &args.shape) || shape_exponent(&frame, argv[8], &args.shape) ||
        frame_int32(&frame, argv[9], "threads", 0, 64, &args.threads) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_w4_unpack(&args));
    return frame_return(&frame);
}

FUNCTION(w4_matmul) {
    (void)module;
    kvc_frame frame = {.op = "w4_matmul"};
    kvc_w4_matmul_args args = {0};
    if (frame_count(&frame, argc, 10) || frame_tensor(&frame, argv[0], "out", FRAME_OUT | FRAME_CUDA, &args.out) ||
        frame_tensor(&frame, argv[1], "x", FRAME_CUDA, &args.x) ||
        frame_tensor(&frame, argv[2], "packed", FRAME_CUDA, &args.packed) ||
        frame_tensor(&frame, argv[3], "bias", FRAME_OPTIONAL | FRAME_CUDA, &args.bias) ||
        frame_tensor(&frame, argv[4], "workspace", FRAME_OUT | FRAME_OPTIONAL | FRAME_CUDA, &args.workspace) ||
        shape_group(&frame, argv + 5, &args.shape) || matmul_exponents(&frame, argv[7], &args) ||
        frame_int32(&frame, argv[8], "threads", 0, 64, &args.threads) ||
        frame_int32(&frame, argv[9], "early", 0, 1, &args.early) || frame_check(&frame))
        return frame_return(&frame);
    shape_of(&args.shape, &args.x);
    args.shape.n = args.out.ndim == 2 ? args.out.shape[1] : 0;
    FRAME_DISPATCH(&frame, w4_matmul);
    return frame_return(&frame);
}

FUNCTION(w4_workspace) {
    (void)module;
    kvc_frame frame = {.op = "w4_workspace"};
    int64_t m, n, k;
    if (frame_count(&frame, argc, 3) || frame_int(&frame, argv[0], "m", 0, INT32_MAX, &m) ||
        frame_int(&frame, argv[1], "n", 0, INT32_MAX, &n) || frame_int(&frame, argv[2], "k", 0, INT32_MAX, &k))
        return NULL;
    const kvc_backend *backend = kvc_cuda(NULL);
    return PyLong_FromLongLong(backend ? backend->w4_workspace(m, n, k) : 0);
}

#define METHOD(name, text) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, text}

PyMethodDef ops_w4_methods[] = {
    METHOD(w4_bytes, "w4_bytes(n, k, group, scale_bits, /)\n--\n\nBytes of packed weights (n,k)."),
    METHOD(w4_scales,
           "w4_scales(out, scales, scale_bits, exponent, rounding, /)\n--\n\n"
           "Numbers that E5Mx codes stand for, nearest to or next below scales. rounding: 0 floor, 1 nearest.\n"
           "Contract: csrc/kvcomp/w4.h."),
    METHOD(w4_pack, "w4_pack(packed, weights, group, scale_bits, exponent, rounding, threads, /)\n--\n\n"
                    "Weights (n,k) to packed bytes; returns the exponent used (exponent None: chosen).\n"
                    "rounding: 0 floor, 1 nearest, 2 search. Contract: csrc/kvcomp/w4.h."),
    METHOD(w4_unpack, "w4_unpack(out, codes, scales, packed, n, k, group, scale_bits, exponent, threads, /)\n--\n\n"
                      "Packed bytes to weights (n,k), codes q + 8 and scales, each of which may be None.\n"
                      "Contract: csrc/kvcomp/w4.h."),
    METHOD(w4_matmul,
           "w4_matmul(out, x, packed, bias, workspace, group, scale_bits, exponent, threads, early, /)\n--\n\n"
           "out (m,n) = x (m,k) times the transposed weights, plus bias. exponent: that of the weights, or a tuple of\n"
           "(rows, exponent) of matrices whose packed bytes follow each other. Contract: csrc/kvcomp/w4.h."),
    METHOD(w4_workspace, "w4_workspace(m, n, k, /)\n--\n\nBytes of w4_matmul's workspace on CUDA."),
    {0}};
