/* score_common.cuh: what score, norms, accumulate, select and pack ask of their tensors' devices. */
#pragma once
#include "common.cuh"

struct kvc_named {
    const char *name;
    const kvc_tensor *tensor;
};

/* All tensors that are given lie on the first one's CUDA device. */
static inline kvc_status kvc_cuda_check(const char *op, const kvc_named *tensors, int count) {
    for (int i = 0; i < count; i++) {
        const kvc_tensor *t = tensors[i].tensor;
        if (!kvc_given(t)) continue;
        KVC_CHECK(t->device == KVC_CUDA, KVC_EDEVICE, "%s: %s: expected a CUDA tensor, got one on the CPU", op,
                  tensors[i].name);
        KVC_CHECK(t->device_id == tensors[0].tensor->device_id, KVC_EDEVICE,
                  "%s: %s: expected the device of %s, cuda:%d, got cuda:%d", op, tensors[i].name, tensors[0].name,
                  tensors[0].tensor->device_id, t->device_id);
    }
    return KVC_OK;
}
