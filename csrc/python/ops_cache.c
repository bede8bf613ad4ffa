/* ops_cache.c: pack, unpack, append, attend, divide, rotate, and the sizes of the format. */
#include "binding.h"
#include "kvcomp/rotate.h"

static PyObject *pack(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "pack"};
    kvc_pack_args args = {0};
    int64_t seed;
    if (frame_count(&frame, argc, 13) || frame_tensor(&frame, argv[0], "arena", FRAME_OUT | FRAME_CUDA, &args.arena) ||
        frame_tensor(&frame, argv[1], "keys", FRAME_CUDA, &args.keys) ||
        frame_tensor(&frame, argv[2], "values", FRAME_CUDA, &args.values) ||
        frame_tensor(&frame, argv[3], "pages", FRAME_CUDA, &args.pages) ||
        frame_tensor(&frame, argv[4], "lists", FRAME_CUDA, &args.lists) ||
        frame_tensor(&frame, argv[5], "start", FRAME_CUDA, &args.start) ||
        frame_tensor(&frame, argv[6], "tokens", FRAME_CUDA, &args.tokens) ||
        frame_layout(&frame, argv[7], &args.layout) || frame_int32(&frame, argv[8], "rotation", 0, 1, &args.rotation) ||
        frame_int32(&frame, argv[9], "scale", 0, 2, &args.scale) ||
        frame_int32(&frame, argv[10], "stochastic", 0, 1, &args.stochastic) ||
        frame_int32(&frame, argv[11], "layer", 0, INT32_MAX, &args.layer) ||
        frame_int(&frame, argv[12], "seed", 0, INT64_MAX, &seed) || frame_check(&frame))
        return frame_return(&frame);
    args.seed = (uint64_t)seed;
    FRAME_DISPATCH(&frame, pack);
    return frame_return(&frame);
}

static PyObject *unpack(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "unpack"};
    kvc_unpack_args args = {0};
    if (frame_count(&frame, argc, 9) || frame_tensor(&frame, argv[0], "keys", FRAME_OUT | FRAME_CUDA, &args.keys) ||
        frame_tensor(&frame, argv[1], "values", FRAME_OUT | FRAME_CUDA, &args.values) ||
        frame_tensor(&frame, argv[2], "arena", FRAME_CUDA, &args.arena) ||
        frame_tensor(&frame, argv[3], "pages", FRAME_CUDA, &args.pages) ||
        frame_tensor(&frame, argv[4], "lists", FRAME_CUDA, &args.lists) ||
        frame_tensor(&frame, argv[5], "start", FRAME_CUDA, &args.start) ||
        frame_tensor(&frame, argv[6], "tokens", FRAME_CUDA, &args.tokens) ||
        frame_layout(&frame, argv[7], &args.layout) || frame_int32(&frame, argv[8], "rotation", 0, 1, &args.rotation) ||
        frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, unpack);
    return frame_return(&frame);
}

static PyObject *append(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "append"};
    kvc_append_args args = {0};
    int64_t seed;
    if (frame_count(&frame, argc, 17) ||
        frame_tensor(&frame, argv[0], "arena", FRAME_INOUT | FRAME_CUDA, &args.arena) ||
        frame_tensor(&frame, argv[1], "table", FRAME_INOUT | FRAME_CUDA, &args.table) ||
        frame_tensor(&frame, argv[2], "lists", FRAME_INOUT | FRAME_CUDA, &args.lists) ||
        frame_tensor(&frame, argv[3], "pool_tail", FRAME_INOUT | FRAME_CUDA, &args.pool_tail) ||
        frame_tensor(&frame, argv[4], "pool_packed", FRAME_INOUT | FRAME_CUDA, &args.pool_packed) ||
        frame_tensor(&frame, argv[5], "left", FRAME_INOUT | FRAME_CUDA, &args.left) ||
        frame_tensor(&frame, argv[6], "keys", FRAME_CUDA, &args.keys) ||
        frame_tensor(&frame, argv[7], "values", FRAME_CUDA, &args.values) ||
        frame_tensor(&frame, argv[8], "valid", FRAME_OPTIONAL | FRAME_CUDA, &args.valid) ||
        frame_tensor(&frame, argv[9], "classes", FRAME_CUDA, &args.classes) ||
        frame_layout(&frame, argv[10], &args.layout) ||
        frame_int32(&frame, argv[11], "window", 0, 1 << 24, &args.window) ||
        frame_int32(&frame, argv[12], "rotation", 0, 1, &args.rotation) ||
        frame_int32(&frame, argv[13], "scale", 0, 2, &args.scale) ||
        frame_int32(&frame, argv[14], "stochastic", 0, 1, &args.stochastic) ||
        frame_int32(&frame, argv[15], "layer", 0, INT32_MAX, &args.layer) ||
        frame_int(&frame, argv[16], "seed", 0, INT64_MAX, &seed) || frame_check(&frame))
        return frame_return(&frame);
    args.seed = (uint64_t)seed;
    FRAME_DISPATCH(&frame, append);
    return frame_return(&frame);
}

static PyObject *append_walk(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "append_walk"};
    kvc_append_walk_args args = {0};
    if (frame_count(&frame, argc, 9) || frame_tensor(&frame, argv[0], "table", FRAME_INOUT, &args.table) ||
        frame_tensor(&frame, argv[1], "lists", FRAME_INOUT, &args.lists) ||
        frame_tensor(&frame, argv[2], "pool_tail", FRAME_INOUT, &args.pool_tail) ||
        frame_tensor(&frame, argv[3], "pool_packed", FRAME_INOUT, &args.pool_packed) ||
        frame_tensor(&frame, argv[4], "left", FRAME_INOUT, &args.left) ||
        frame_tensor(&frame, argv[5], "valid", FRAME_OPTIONAL, &args.valid) ||
        frame_tensor(&frame, argv[6], "classes", FRAME_IN, &args.classes) ||
        frame_int32(&frame, argv[7], "window", 0, 1 << 24, &args.window) ||
        frame_int32(&frame, argv[8], "q", 0, 1 << 24, &args.q) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_append_walk(&args));
    return frame_return(&frame);
}

static PyObject *append_need(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "append_need"};
    int32_t tail, q, window, packs;
    if (frame_count(&frame, argc, 4) || frame_int32(&frame, argv[0], "tail_tokens", 0, 1 << 30, &tail) ||
        frame_int32(&frame, argv[1], "q", 0, 1 << 24, &q) ||
        frame_int32(&frame, argv[2], "window", 0, 1 << 24, &window) ||
        frame_int32(&frame, argv[3], "packs", 0, 1, &packs))
        return frame_return(&frame);
    int tail_pages, packed_pages;
    kvc_append_need(tail, q, window, packs, &tail_pages, &packed_pages);
    return Py_BuildValue("(ii)", tail_pages, packed_pages);
}

static PyObject *attend(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "attend"};
    kvc_attend_args args = {0};
    if (frame_count(&frame, argc, 15) || frame_tensor(&frame, argv[0], "out", FRAME_OUT | FRAME_CUDA, &args.out) ||
        frame_tensor(&frame, argv[1], "mass", FRAME_OUT | FRAME_OPTIONAL | FRAME_CUDA, &args.mass) ||
        frame_tensor(&frame, argv[2], "queries", FRAME_CUDA, &args.queries) ||
        frame_tensor(&frame, argv[3], "arena", FRAME_CUDA, &args.arena) ||
        frame_tensor(&frame, argv[4], "table", FRAME_CUDA, &args.table) ||
        frame_tensor(&frame, argv[5], "lists", FRAME_CUDA, &args.lists) ||
        frame_tensor(&frame, argv[6], "new_tokens", FRAME_OPTIONAL | FRAME_CUDA, &args.new_tokens) ||
        frame_tensor(&frame, argv[7], "workspace", FRAME_OUT | FRAME_CUDA, &args.workspace) ||
        frame_layout(&frame, argv[8], &args.layout) || frame_int32(&frame, argv[9], "rotation", 0, 1, &args.rotation) ||
        frame_float(&frame, argv[10], "scale", 1e-30, 1e30, &args.scale) ||
        frame_float(&frame, argv[11], "softcap", 0, 1e30, &args.softcap) ||
        frame_int32(&frame, argv[12], "threads", 0, 64, &args.threads) ||
        frame_tensor(&frame, argv[13], "division", FRAME_OPTIONAL | FRAME_CUDA, &args.division) ||
        frame_int32(&frame, argv[14], "early", 0, 1, &args.early) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, attend);
    return frame_return(&frame);
}

static PyObject *attend_workspace(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "attend_workspace"};
    int64_t lists, pages, group, q, head_dim;
    const int64_t most = (int64_t)1 << 24;
    if (frame_count(&frame, argc, 5) || frame_int(&frame, argv[0], "lists", 0, most, &lists) ||
        frame_int(&frame, argv[1], "pages", 0, most, &pages) || frame_int(&frame, argv[2], "group", 0, most, &group) ||
        frame_int(&frame, argv[3], "q", 0, most, &q) ||
        frame_int(&frame, argv[4], "head_dim", 1, KVC_MAX_HEAD_DIM, &head_dim))
        return frame_return(&frame);
    return PyLong_FromLongLong(kvc_attend_workspace(lists, pages, group, q, (int32_t)head_dim));
}

static PyObject *attend_workspace_cuda(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "attend_workspace_cuda"};
    int64_t n, c, group, q, head_dim, mass_tokens;
    const int64_t most = (int64_t)1 << 24;
    if (frame_count(&frame, argc, 6) || frame_int(&frame, argv[0], "n", 0, most, &n) ||
        frame_int(&frame, argv[1], "c", 0, most, &c) || frame_int(&frame, argv[2], "group", 0, most, &group) ||
        frame_int(&frame, argv[3], "q", 0, most, &q) ||
        frame_int(&frame, argv[4], "head_dim", 1, KVC_MAX_HEAD_DIM, &head_dim) ||
        frame_int(&frame, argv[5], "mass_tokens", 0, INT32_MAX, &mass_tokens))
        return frame_return(&frame);
    const kvc_backend *backend = frame_backend(&frame);
    if (!backend) return NULL;
    return PyLong_FromLongLong(backend->attend_workspace(n, c, group, q, (int32_t)head_dim, mass_tokens));
}

static PyObject *divide(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "divide"};
    kvc_divide_args args = {0};
    if (frame_count(&frame, argc, 4) ||
        frame_tensor(&frame, argv[0], "divisions", FRAME_OUT | FRAME_CUDA, &args.divisions) ||
        frame_tensor(&frame, argv[1], "tables", FRAME_CUDA, &args.tables) ||
        frame_tensor(&frame, argv[2], "lists", FRAME_CUDA, &args.lists) ||
        frame_layout(&frame, argv[3], &args.layout) || frame_check(&frame))
        return frame_return(&frame);
    if (frame_device(&frame) == KVC_CPU) {
        PyErr_SetString(PyExc_ValueError, "divide: divisions: expected a CUDA tensor, got one on the CPU");
        frame.failed = true;
        return frame_return(&frame);
    }
    const kvc_backend *backend = frame_backend(&frame);
    if (backend) FRAME_RUN_CUDA(&frame, backend, backend->divide(&args, frame.stream));
    return frame_return(&frame);
}

static PyObject *divide_words(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "divide_words"};
    int64_t n;
    int32_t device;
    if (frame_count(&frame, argc, 2) || frame_int(&frame, argv[0], "n", 0, 1 << 24, &n) ||
        frame_int32(&frame, argv[1], "device", 0, INT32_MAX, &device))
        return frame_return(&frame);
    const kvc_backend *backend = frame_backend(&frame);
    if (!backend) return NULL;
    const int64_t words = backend->divide_words(n, device);
    if (words > 0) return PyLong_FromLongLong(words);
    kvc_fail(KVC_ENODEV, "divide_words: device: expected a CUDA device's number, got %d", device);
    return raise_status(KVC_ENODEV);
}

static PyObject *rotate(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "rotate"};
    kvc_rotate_args args = {0};
    if (frame_count(&frame, argc, 4) || frame_tensor(&frame, argv[0], "out", FRAME_OUT, &args.out) ||
        frame_tensor(&frame, argv[1], "rows", FRAME_IN, &args.rows) ||
        frame_tensor(&frame, argv[2], "matrix", FRAME_IN, &args.matrix) ||
        frame_int32(&frame, argv[3], "transpose", 0, 1, &args.transpose) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_rotate_cpu(&args, NULL));
    return frame_return(&frame);
}

/* (layout, k_bits, v_bits) of the three functions below. */
static int class_arguments(kvc_frame *frame, PyObject *const *argv, Py_ssize_t argc, kvc_layout *layout,
                           int32_t bits[2]) {
    if (frame_count(frame, argc, layout ? 3 : 2) || (layout && frame_layout(frame, argv[0], layout))) return -1;
    for (int i = 0; i < 2; i++) {
        if (frame_int32(frame, argv[(layout ? 1 : 0) + i], i ? "v_bits" : "k_bits", 2, 16, &bits[i])) return -1;
        if (kvc_bits_ok(bits[i])) continue;
        kvc_fail(KVC_EINVAL, "%s: %s: expected 2, 3, 4, 8 or 16, got %d", frame->op, i ? "v_bits" : "k_bits", bits[i]);
        raise_status(KVC_EINVAL);
        frame->failed = true;
        return -1;
    }
    return 0;
}

static PyObject *page_bytes(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "page_bytes"};
    kvc_layout layout;
    int32_t bits[2];
    if (class_arguments(&frame, argv, argc, &layout, bits)) return frame_return(&frame);
    return PyLong_FromLongLong(kvc_page_bytes(&layout, bits[0], bits[1]));
}

static PyObject *page_tokens(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "page_tokens"};
    int32_t bits[2];
    if (class_arguments(&frame, argv, argc, NULL, bits)) return frame_return(&frame);
    return PyLong_FromLong(kvc_page_tokens(bits[0], bits[1]));
}

static PyObject *scale_bytes(PyObject *module, PyObject *const *argv, Py_ssize_t argc) {
    (void)module;
    kvc_frame frame = {.op = "scale_bytes"};
    kvc_layout layout;
    int32_t bits[2];
    if (class_arguments(&frame, argv, argc, &layout, bits)) return frame_return(&frame);
    const int tokens = kvc_page_tokens(bits[0], bits[1]);
    return PyLong_FromLongLong(kvc_scale_bytes(&layout, bits[0], tokens) + kvc_scale_bytes(&layout, bits[1], tokens));
}

#define METHOD(name, signature, text) {#name, (PyCFunction)(void *)name, METH_FASTCALL, #name signature "\n--\n\n" text}
PyMethodDef ops_cache_methods[] = {
    METHOD(pack,
           "(arena, keys, values, pages, lists, start, tokens, layout, rotation, scale, stochastic, layer, seed, /)",
           "K, V rows into packed pages (csrc/kvcomp/pack.h)."),
    METHOD(unpack, "(keys, values, arena, pages, lists, start, tokens, layout, rotation, /)",
           "Packed pages back into K, V rows (csrc/kvcomp/pack.h)."),
    METHOD(append,
           "(arena, table, lists, pool_tail, pool_packed, left, keys, values, valid, classes, layout, window, "
           "rotation, scale, stochastic, layer, seed, /)",
           "New K, V rows behind every list; what has aged is packed (csrc/kvcomp/append.h)."),
    METHOD(append_walk, "(table, lists, pool_tail, pool_packed, left, valid, classes, window, q, /)",
           "What append does to tables, lists and stacks, without the rows (csrc/kvcomp/append.h)."),
    METHOD(append_need, "(tail_tokens, q, window, packs, /)",
           "Most (tail, packed) pages one list takes for q new tokens."),
    METHOD(attend,
           "(out, mass, queries, arena, table, lists, new_tokens, workspace, layout, rotation, scale, softcap, "
           "threads, division, early, /)",
           "Attention over packed pages (csrc/kvcomp/attend.h)."),
    METHOD(attend_workspace, "(lists, pages, group, q, head_dim, /)", "Bytes of workspace that attend needs."),
    METHOD(attend_workspace_cuda, "(n, c, group, q, head_dim, mass_tokens, /)",
           "Bytes of workspace that attend needs on CUDA; mass_tokens 0: without mass."),
    METHOD(divide, "(divisions, tables, lists, layout, /)",
           "attend's work over a GPU's multiprocessors, for all layers (csrc/kvcomp/divide.h)."),
    METHOD(divide_words, "(n, device, /)", "Words of a layer's division of n lists on this CUDA device."),
    METHOD(rotate, "(out, rows, matrix, transpose, /)", "Rows times a matrix a KV head (csrc/kvcomp/rotate.h)."),
    METHOD(page_bytes, "(layout, k_bits, v_bits, /)", "Bytes of a page of this class."),
    METHOD(page_tokens, "(k_bits, v_bits, /)", "Tokens a page of this class holds."),
    METHOD(scale_bytes, "(layout, k_bits, v_bits, /)", "Bytes of a page's scales and zeros."),
    {0}};
