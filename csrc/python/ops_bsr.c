/* ops_bsr.c: bsr_check, bsr_plan, bsr_merge, bsr_matmul, bsr_sddmm. */
#include "binding.h"
#include "kvcomp/bsr.h"

#include <float.h>

#define FUNCTION(name) static PyObject *name(PyObject *module, PyObject *const *argv, Py_ssize_t argc)

/* indptr, indices, m, k, block from argv on. */
static int structure(kvc_frame *frame, PyObject *const *argv, kvc_bsr_structure *a) {
    return frame_tensor(frame, argv[0], "indptr", FRAME_IN, &a->indptr) ||
           frame_tensor(frame, argv[1], "indices", FRAME_IN, &a->indices) ||
           frame_int(frame, argv[2], "m", 0, INT32_MAX, &a->m) || frame_int(frame, argv[3], "k", 0, INT32_MAX, &a->k) ||
           frame_int32(frame, argv[4], "block", 1, KVC_BSR_ROWS, &a->block);
}

FUNCTION(check) {
    (void)module;
    kvc_frame frame = {.op = "bsr_check"};
    kvc_bsr_structure a = {0};
    if (frame_count(&frame, argc, 5) || structure(&frame, argv, &a) || frame_check(&frame)) return frame_return(&frame);
    FRAME_RUN(&frame, kvc_bsr_check(&a));
    return frame_return(&frame);
}

FUNCTION(plan_words) {
    (void)module;
    kvc_frame frame = {.op = "bsr_plan_words"};
    int64_t m, k, block, blocks;
    int32_t transpose;
    if (frame_count(&frame, argc, 5) || frame_int(&frame, argv[0], "m", 0, INT32_MAX, &m) ||
        frame_int(&frame, argv[1], "k", 0, INT32_MAX, &k) ||
        frame_int(&frame, argv[2], "block", 16, KVC_BSR_ROWS, &block) ||
        frame_int(&frame, argv[3], "nnzb", 0, INT32_MAX, &blocks) ||
        frame_int32(&frame, argv[4], "transpose", 0, 1, &transpose))
        return frame_return(&frame);
    if (!kvc_bsr_block_ok(block)) {
        PyErr_Format(PyExc_ValueError, "bsr_plan_words: block: expected 16, 32, 64 or 128, got %lld", (long long)block);
        return NULL;
    }
    return PyLong_FromLongLong(kvc_bsr_plan_words(m, k, block, blocks, transpose));
}

/* What a call that fills in `number` returns. */
static PyObject *counted(kvc_frame *frame, int64_t number) {
    PyObject *done = frame_return(frame);
    if (!done) return NULL;
    Py_DECREF(done);
    return PyLong_FromLongLong(number);
}

FUNCTION(plan) {
    (void)module;
    kvc_frame frame = {.op = "bsr_plan"};
    int64_t used = 0;
    kvc_bsr_plan_args args = {.used = &used};
    if (frame_count(&frame, argc, 7) || frame_tensor(&frame, argv[0], "plan", FRAME_OUT, &args.plan) ||
        structure(&frame, argv + 1, &args.a) || frame_int32(&frame, argv[6], "transpose", 0, 1, &args.transpose) ||
        frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_bsr_plan(&args));
    return counted(&frame, used);
}

FUNCTION(merge) {
    (void)module;
    kvc_frame frame = {.op = "bsr_merge"};
    int64_t blocks = 0;
    kvc_bsr_merge_args args = {.blocks = &blocks};
    if (frame_count(&frame, argc, 9) || frame_tensor(&frame, argv[0], "indptr_out", FRAME_OUT, &args.indptr) ||
        frame_tensor(&frame, argv[1], "indices_out", FRAME_OUT, &args.indices) ||
        frame_tensor(&frame, argv[2], "place", FRAME_OUT, &args.place) || structure(&frame, argv + 3, &args.a) ||
        frame_int32(&frame, argv[8], "factor", 2, 8, &args.factor) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_RUN(&frame, kvc_bsr_merge(&args));
    return counted(&frame, blocks);
}

FUNCTION(matmul) {
    (void)module;
    kvc_frame frame = {.op = "bsr_matmul"};
    kvc_bsr_matmul_args args = {0};
    if (frame_count(&frame, argc, 9) || frame_tensor(&frame, argv[0], "out", FRAME_INOUT | FRAME_CUDA, &args.out) ||
        frame_tensor(&frame, argv[1], "values", FRAME_CUDA, &args.values) ||
        frame_tensor(&frame, argv[2], "plan", FRAME_CUDA, &args.plan) ||
        frame_tensor(&frame, argv[3], "dense", FRAME_CUDA, &args.dense) ||
        frame_tensor(&frame, argv[4], "workspace", FRAME_OUT | FRAME_OPTIONAL | FRAME_CUDA, &args.workspace) ||
        frame_int(&frame, argv[5], "m", 0, INT32_MAX, &args.m) ||
        frame_int(&frame, argv[6], "k", 0, INT32_MAX, &args.k) ||
        frame_int32(&frame, argv[7], "transpose", 0, 1, &args.transpose) ||
        frame_float(&frame, argv[8], "beta", -FLT_MAX, FLT_MAX, &args.beta) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, bsr_matmul);
    return frame_return(&frame);
}

FUNCTION(sddmm) {
    (void)module;
    kvc_frame frame = {.op = "bsr_sddmm"};
    kvc_bsr_sddmm_args args = {0};
    if (frame_count(&frame, argc, 5) || frame_tensor(&frame, argv[0], "out", FRAME_OUT | FRAME_CUDA, &args.out) ||
        frame_tensor(&frame, argv[1], "plan", FRAME_CUDA, &args.plan) ||
        frame_tensor(&frame, argv[2], "left", FRAME_CUDA, &args.left) ||
        frame_tensor(&frame, argv[3], "right", FRAME_CUDA, &args.right) ||
        frame_int32(&frame, argv[4], "transpose", 0, 1, &args.transpose) || frame_check(&frame))
        return frame_return(&frame);
    FRAME_DISPATCH(&frame, bsr_sddmm);
    return frame_return(&frame);
}

#define METHOD(name, signature, text) \
    {"bsr_" #name, (PyCFunction)(void *)name, METH_FASTCALL, "bsr_" #name signature "\n--\n\n" text}
PyMethodDef ops_bsr_methods[] = {
    METHOD(check, "(indptr, indices, m, k, block, /)",
           "Refuses a structure whose block columns do not ascend within range (csrc/kvcomp/bsr.h)."),
    METHOD(plan_words, "(m, k, block, nnzb, transpose, /)", "The most words that a plan of such a matrix has."),
    METHOD(plan, "(plan, indptr, indices, m, k, block, transpose, /)",
           "What products with a block-sparse matrix, or its transpose, read; returns the words used.\n"
           "Contract: csrc/kvcomp/bsr.h."),
    METHOD(merge, "(indptr_out, indices_out, place, indptr, indices, m, k, block, factor, /)",
           "The structure of blocks `factor` times as large, and each block's place in them; returns their number.\n"
           "Contract: csrc/kvcomp/bsr.h."),
    METHOD(matmul, "(out, values, plan, dense, workspace, m, k, transpose, beta, /)",
           "out = A dense + beta * out, or with A's transpose (csrc/kvcomp/bsr.h)."),
    METHOD(sddmm, "(out, plan, left, right, transpose, /)",
           "out = left right^T at A's stored blocks: the gradient of its values (csrc/kvcomp/bsr.h)."),
    {0}};
