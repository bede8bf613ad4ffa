/* memory.cuh: memory of arenas (backend.h states each function), and what backend.cu answers it with. */
#pragma once
#include "common.cuh"
#include "kvcomp/backend.h"

int kvc_device_count(const char **why); /* as the table's device_count */

kvc_status kvc_memory_reserve(int device, int64_t bytes, kvc_memory *out);
kvc_status kvc_memory_commit(const kvc_memory *memory, int64_t first, int64_t bytes, int64_t each);
kvc_status kvc_memory_release(const kvc_memory *memory, int64_t first, int64_t bytes);
kvc_status kvc_memory_unreserve(const kvc_memory *memory);
kvc_status kvc_memory_copy(const kvc_memory *memory, int64_t count, const kvc_copy *copies, int32_t wait,
                           kvc_stream stream);
