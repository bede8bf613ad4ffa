/* ops_policy.c: score, norms, accumulate, select, ada, share, pyramid, plan, shrink. */
#include "binding.h"
#include "kvcomp/plan.h"
#include "kvcomp/shrink.h"

#include <float.h>

#define FUNCTION(name) static PyObject *name(PyObject *module, PyObject *const *argv, Py_ssize_t argc)

FUNCTION(score) {
    (void)module;
    kvc_frame frame = {.op = "score"};
    kvc_score_args args = {0};
    if (frame_count(&frame, argc, 10) ||
        frame_tensor(&frame, argv[0], "importance", FRAME_OUT | FRAME_CUDA, &args.importance) ||
        frame_tensor(&frame, argv[1], "queries", FRAME_CUDA, &args.queries) ||
        frame_tensor(&frame, argv[2], "keys", FRAME_CUDA, &args.keys) ||
        frame_tensor(&frame, argv[3], "first", FRAME_OPTIONAL | FRAME_CUDA, &args.first) ||
        frame_tensor(&frame, argv[4], "workspace", FRAME_OUT | FRAME_CUDA, &args.workspace) ||
        frame_float(&frame, argv[5], "scale", -FLT_MAX, FLT_MAX, &args.scale) ||
        frame_float(&frame, argv[6], "softcap", 0.0, FLT_MAX, &args.softcap) ||
        frame_int32(&frame, argv[7], "reduce", KVC_REDUCE_SUM, KVC_REDUCE_SEEN, &args.reduce) ||
        frame_int32(&frame, argv[8], "pool_kind", KVC_POOL_AVG, KVC_POOL_MAX, &args.pool_kind) ||
        frame_int32(&frame, argv[9], "pool", 1, INT32_MAX, &args.pool) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, score);
    return frame_return(&frame);
}

/* Sizes of a workspace: `count` integers named in `names`, each 0 .. 2^31 - 1. */
static bool sizes(const char *op, PyObject *const *argv, Py_ssize_t argc, const char *const *names, int count,
                  int64_t *out) {
    kvc_frame frame = {.op = op};
    if (frame_count(&frame, argc, count)) return false;
    for (int i = 0; i < count; i++)
        if (frame_int(&frame, argv[i], names[i], 0, INT32_MAX, &out[i])) return false;
    return true;
}

FUNCTION(score_workspace) {
    (void)module;
    int64_t n[5];
    if (!sizes("score_workspace", argv, argc, (const char *const[]){"b", "hq", "w", "s", "d"}, 5, n)) return NULL;
    return PyLong_FromLongLong(kvc_score_workspace(n[0], n[1], n[2], n[3], n[4]));
}

FUNCTION(norms) {
    (void)module;
    kvc_frame frame = {.op = "norms"};
    kvc_norms_args args = {0};
    if (frame_count(&frame, argc, 4) || frame_tensor(&frame, argv[0], "out", FRAME_OUT | FRAME_CUDA, &args.out) ||
        frame_tensor(&frame, argv[1], "rows", FRAME_CUDA, &args.rows) ||
        frame_tensor(&frame, argv[2], "first", FRAME_OPTIONAL | FRAME_CUDA, &args.first) ||
        frame_int32(&frame, argv[3], "centered", 0, 1, &args.centered) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, norms);
    return frame_return(&frame);
}

FUNCTION(accumulate) {
    (void)module;
    kvc_frame frame = {.op = "accumulate"};
    kvc_accumulate_args args = {0};
    if (frame_count(&frame, argc, 6) || frame_tensor(&frame, argv[0], "worth", FRAME_INOUT | FRAME_CUDA, &args.worth) ||
        frame_tensor(&frame, argv[1], "mass", FRAME_CUDA, &args.mass) ||
        frame_tensor(&frame, argv[2], "table", FRAME_CUDA, &args.table) ||
        frame_tensor(&frame, argv[3], "lists", FRAME_CUDA, &args.lists) ||
        frame_float(&frame, argv[4], "keep", 0.0, 1.0, &args.keep) ||
        frame_float(&frame, argv[5], "gain", 0.0, FLT_MAX, &args.gain) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, accumulate);
    return frame_return(&frame);
}

/* `select` is taken: a system call of that name comes with Python.h. */
FUNCTION(select_tokens) {
    (void)module;
    kvc_frame frame = {.op = "select"};
    kvc_select_args args = {0};
    if (frame_count(&frame, argc, 7) || frame_tensor(&frame, argv[0], "kept", FRAME_OUT | FRAME_CUDA, &args.kept) ||
        frame_tensor(&frame, argv[1], "importance", FRAME_OPTIONAL | FRAME_CUDA, &args.importance) ||
        frame_tensor(&frame, argv[2], "keep", FRAME_CUDA, &args.keep) ||
        frame_tensor(&frame, argv[3], "first", FRAME_OPTIONAL | FRAME_CUDA, &args.first) ||
        frame_tensor(&frame, argv[4], "workspace", FRAME_OUT | FRAME_CUDA, &args.workspace) ||
        frame_int32(&frame, argv[5], "sinks", 0, INT32_MAX, &args.sinks) ||
        frame_int32(&frame, argv[6], "window", 0, INT32_MAX, &args.window) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, select);
    return frame_return(&frame);
}

FUNCTION(select_workspace) {
    (void)module;
    int64_t n[2];
    if (!sizes("select_workspace", argv, argc, (const char *const[]){"n", "s"}, 2, n)) return NULL;
    return PyLong_FromLongLong(kvc_select_workspace(n[0], n[1]));
}

FUNCTION(ada) {
    (void)module;
    kvc_frame frame = {.op = "ada"};
    kvc_ada_args args = {0};
    if (frame_count(&frame, argc, 9) || frame_tensor(&frame, argv[0], "kept", FRAME_OUT, &args.kept) ||
        frame_tensor(&frame, argv[1], "importance", FRAME_IN, &args.importance) ||
        frame_tensor(&frame, argv[2], "keep", FRAME_IN, &args.keep) ||
        frame_tensor(&frame, argv[3], "first", FRAME_OPTIONAL, &args.first) ||
        frame_tensor(&frame, argv[4], "workspace", FRAME_OUT, &args.workspace) ||
        frame_int32(&frame, argv[5], "heads", 1, INT32_MAX, &args.heads) ||
        frame_tensor(&frame, argv[6], "floor", FRAME_IN, &args.floor) ||
        frame_int32(&frame, argv[7], "sinks", 0, INT32_MAX, &args.sinks) ||
        frame_int32(&frame, argv[8], "window", 0, INT32_MAX, &args.window) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_ada_cpu(&args, NULL));
    return frame_return(&frame);
}

FUNCTION(ada_workspace) {
    (void)module;
    int64_t n[2];
    if (!sizes("ada_workspace", argv, argc, (const char *const[]){"n", "s"}, 2, n)) return NULL;
    return PyLong_FromLongLong(kvc_ada_workspace(n[0], n[1]));
}

FUNCTION(share) {
    (void)module;
    kvc_frame frame = {.op = "share"};
    kvc_share_args args = {0};
    if (frame_count(&frame, argc, 5) || frame_tensor(&frame, argv[0], "shares", FRAME_OUT, &args.shares) ||
        frame_tensor(&frame, argv[1], "weight", FRAME_IN, &args.weight) ||
        frame_tensor(&frame, argv[2], "floor", FRAME_IN, &args.floor) ||
        frame_tensor(&frame, argv[3], "ceiling", FRAME_IN, &args.ceiling) ||
        frame_int(&frame, argv[4], "total", 0, INT64_MAX, &args.total) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_select_share(&args));
    return frame_return(&frame);
}

FUNCTION(pyramid) {
    (void)module;
    kvc_frame frame = {.op = "pyramid"};
    kvc_tensor weight;
    double beta;
    if (frame_count(&frame, argc, 2) || frame_tensor(&frame, argv[0], "weight", FRAME_OUT, &weight) ||
        frame_double(&frame, argv[1], "beta", 1.0, FLT_MAX, &beta) || frame_check(&frame))
        return frame_return(&frame);
    kvc_status status = kvc_expect_array("pyramid", "weight", &weight, KVC_FLOAT64, 1, (int64_t[]){-1});
    if (status == KVC_OK && weight.shape[0] > INT32_MAX)
        status = kvc_fail(KVC_ESHAPE, "pyramid: weight: expected at most 2^31 - 1 layers, got %lld",
                          (long long)weight.shape[0]);
    if (status == KVC_OK) status = kvc_select_pyramid((int32_t)weight.shape[0], beta, weight.data);
    if (status != KVC_OK) {
        raise_status(status);
        frame.failed = true;
    }
    return frame_return(&frame);
}

/* Gives the exception that is set an attribute `least_bytes`. */
static void add_least_bytes(int64_t least_bytes) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *number = PyLong_FromLongLong(least_bytes);
    if (!number || PyObject_SetAttrString(value, "least_bytes", number)) PyErr_Clear();
    Py_XDECREF(number);
    PyErr_Restore(type, value, trace);
}

FUNCTION(plan) {
    (void)module;
    kvc_frame frame = {.op = "plan"};
    kvc_plan_summary summary = {.least_bytes = -1};
    kvc_plan_args args = {.summary = &summary};
    if (frame_count(&frame, argc, 18) || frame_tensor(&frame, argv[0], "k_bits", FRAME_OUT, &args.k_bits) ||
        frame_tensor(&frame, argv[1], "v_bits", FRAME_OUT, &args.v_bits) ||
        frame_tensor(&frame, argv[2], "importance", FRAME_IN, &args.importance) ||
        frame_tensor(&frame, argv[3], "kept", FRAME_IN, &args.kept) ||
        frame_tensor(&frame, argv[4], "fixed", FRAME_IN, &args.fixed) ||
        frame_tensor(&frame, argv[5], "distortion_k", FRAME_IN, &args.distortion_k) ||
        frame_tensor(&frame, argv[6], "distortion_v", FRAME_IN, &args.distortion_v) ||
        frame_tensor(&frame, argv[7], "drop", FRAME_IN, &args.drop) ||
        frame_tensor(&frame, argv[8], "allowed", FRAME_IN, &args.allowed) ||
        frame_tensor(&frame, argv[9], "least_tokens", FRAME_OPTIONAL, &args.least_tokens) ||
        frame_tensor(&frame, argv[10], "guard", FRAME_OPTIONAL, &args.guard) ||
        frame_tensor(&frame, argv[11], "groups", FRAME_OPTIONAL, &args.groups) ||
        frame_tensor(&frame, argv[12], "workspace", FRAME_OUT, &args.workspace) ||
        frame_layout(&frame, argv[13], &args.layout) ||
        frame_int(&frame, argv[14], "budget", INT64_MIN, INT64_MAX, &args.budget) ||
        frame_int(&frame, argv[15], "entry_bytes", 0, INT64_MAX, &args.entry_bytes) ||
        frame_int(&frame, argv[16], "list_bytes", 0, INT64_MAX, &args.list_bytes) ||
        frame_int32(&frame, argv[17], "fixed_class", 0, 1, &args.fixed_class) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_plan_cpu(&args, NULL));
    if (frame.failed && summary.least_bytes >= 0) add_least_bytes(summary.least_bytes); /* set on EBUDGET only */
    PyObject *done = frame_return(&frame);
    if (!done) return NULL;
    Py_DECREF(done);
    return Py_BuildValue("(LLLLLd)", (long long)summary.bytes, (long long)summary.least_bytes,
                         (long long)summary.most_bytes, (long long)summary.kept, (long long)summary.pages,
                         summary.error);
}

FUNCTION(plan_workspace) {
    (void)module;
    int64_t n[2];
    if (!sizes("plan_workspace", argv, argc, (const char *const[]){"n", "s"}, 2, n)) return NULL;
    return PyLong_FromLongLong(kvc_plan_workspace(n[0], n[1]));
}

FUNCTION(shrink) {
    (void)module;
    kvc_frame frame = {.op = "shrink"};
    kvc_shrink_summary summary = {.least_bytes = -1};
    kvc_shrink_args args = {.summary = &summary};
    if (frame_count(&frame, argc, 13) || frame_tensor(&frame, argv[0], "k_bits", FRAME_INOUT, &args.k_bits) ||
        frame_tensor(&frame, argv[1], "v_bits", FRAME_INOUT, &args.v_bits) ||
        frame_tensor(&frame, argv[2], "lists", FRAME_IN, &args.lists) ||
        frame_tensor(&frame, argv[3], "counts", FRAME_OPTIONAL, &args.counts) ||
        frame_tensor(&frame, argv[4], "weight", FRAME_IN, &args.weight) ||
        frame_tensor(&frame, argv[5], "distortion_k", FRAME_IN, &args.distortion_k) ||
        frame_tensor(&frame, argv[6], "distortion_v", FRAME_IN, &args.distortion_v) ||
        frame_tensor(&frame, argv[7], "drop", FRAME_IN, &args.drop) ||
        frame_tensor(&frame, argv[8], "allowed", FRAME_IN, &args.allowed) ||
        frame_tensor(&frame, argv[9], "workspace", FRAME_OUT, &args.workspace) ||
        frame_layout(&frame, argv[10], &args.layout) ||
        frame_int(&frame, argv[11], "entry_bytes", 0, INT64_MAX, &args.entry_bytes) ||
        frame_int(&frame, argv[12], "wanted", 0, INT64_MAX, &args.wanted) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_shrink_cpu(&args, NULL));
    if (frame.failed && summary.least_bytes >= 0) add_least_bytes(summary.least_bytes); /* set on EBUDGET only */
    PyObject *done = frame_return(&frame);
    if (!done) return NULL;
    Py_DECREF(done);
    return PyLong_FromLongLong(summary.freed);
}

FUNCTION(shrink_workspace) {
    (void)module;
    int64_t n[2];
    if (!sizes("shrink_workspace", argv, argc, (const char *const[]){"n", "m"}, 2, n)) return NULL;
    return PyLong_FromLongLong(kvc_shrink_workspace(n[0], n[1]));
}

#define METHOD(name, function, text) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, text}

PyMethodDef ops_policy_methods[] = {
    METHOD(
        "score", score,
        "score(importance, queries, keys, first, workspace, scale, softcap, reduce, pool_kind, pool, /)\n--\n\n"
        "Importance (b,h,s) of every token from the attention of the last w queries (b,hq,w,d) over keys (b,h,s,d).\n"
        "first: first real token (b,), or None. reduce: 0 sum, 1 mean, 2 mean over the rows that see the token.\n"
        "pool_kind: 0 average, 1 maximum; pool: odd width.\n"
        "Contract: csrc/kvcomp/score.h."),
    METHOD("score_workspace", score_workspace, "score_workspace(b, hq, w, s, d, /)\n--\n\nBytes of score's workspace."),
    METHOD("norms", norms,
           "norms(out, rows, first, centered, /)\n--\n\n"
           "L2 norms (b,h,s) of rows (b,h,s,d), centered: of rows minus their list's mean; 0 for padding.\n"
           "Contract: csrc/kvcomp/score.h."),
    METHOD("accumulate", accumulate,
           "accumulate(worth, mass, table, lists, keep, gain, /)\n--\n\n"
           "worth (n,c) = keep * worth + gain * the sum of mass (n,m) over each page's tokens.\n"
           "Contract: csrc/kvcomp/score.h."),
    METHOD(
        "select", select_tokens,
        "select(kept, importance, keep, first, workspace, sinks, window, /)\n--\n\n"
        "Marks, in kept (n,s), the newest `window`, the first `sinks` and the most important others, keep[i] in all.\n"
        "importance None: sinks and the newest. Contract: csrc/kvcomp/select.h."),
    METHOD("select_workspace", select_workspace, "select_workspace(n, s, /)\n--\n\nBytes of select's workspace."),
    METHOD("ada", ada,
           "ada(kept, importance, keep, first, workspace, heads, floor, sinks, window, /)\n--\n\n"
           "Marks, in kept (n,s), floor[b] tokens of every head as select would, then the most important over all\n"
           "heads of the sequence, keep[b] in all. Contract: csrc/kvcomp/select.h."),
    METHOD("ada_workspace", ada_workspace, "ada_workspace(n, s, /)\n--\n\nBytes of ada's workspace."),
    METHOD("share", share,
           "share(shares, weight, floor, ceiling, total, /)\n--\n\n"
           "Divides `total` tokens over layers in proportion to weight, within floor and ceiling, exactly.\n"
           "Contract: csrc/kvcomp/select.h."),
    METHOD("pyramid", pyramid,
           "pyramid(weight, beta, /)\n--\n\n"
           "PyramidKV's falling weights, mean 1, the last one 1 / beta. Contract: csrc/kvcomp/select.h."),
    METHOD(
        "plan", plan,
        "plan(k_bits, v_bits, importance, kept, fixed, distortion_k, distortion_v, drop, allowed, least_tokens, guard, "
        "groups, workspace, layout, budget, entry_bytes, list_bytes, fixed_class, /)\n--\n\n"
        "Bits of every token under one byte budget (< 0: none). Returns (bytes, least_bytes, most_bytes, kept, pages, "
        "error).\n"
        "Raises BudgetError, whose least_bytes is what the smallest plan takes. Contract: csrc/kvcomp/plan.h."),
    METHOD("plan_workspace", plan_workspace, "plan_workspace(n, s, /)\n--\n\nBytes of plan's workspace."),
    METHOD(
        "shrink", shrink,
        "shrink(k_bits, v_bits, lists, counts, weight, distortion_k, distortion_v, drop, allowed, workspace, layout, "
        "entry_bytes, wanted, /)\n--\n\n"
        "Lowers, in place, the bits of pages (m,), 0: evicted, until `wanted` bytes are freed; returns the bytes "
        "freed.\n"
        "Raises BudgetError where there is less to free. Contract: csrc/kvcomp/shrink.h."),
    METHOD("shrink_workspace", shrink_workspace, "shrink_workspace(n, m, /)\n--\n\nBytes of shrink's workspace."),
    {0}};
