/* attend_launch.cuh: the launches of attention's kernels, one a head dimension, each in a file of its own, so that they
 * compile side by side. */
#pragma once
#include "attend_job.cuh"

cudaError_t kvc_launch_attend_64(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_64(int columns, int shared_most);
cudaError_t kvc_launch_attend_80(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_80(int columns, int shared_most);
cudaError_t kvc_launch_attend_96(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_96(int columns, int shared_most);
cudaError_t kvc_launch_attend_128(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_128(int columns, int shared_most);
cudaError_t kvc_launch_attend_256(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_256(int columns, int shared_most);

#define KVC_ATTEND_ROWS_SHARED (227 << 10) /* bytes of shared memory that attend_rows wants: sm_90's */
cudaError_t kvc_launch_attend_rows_64(void *job, int blocks, int shared_most, cudaStream_t stream);
cudaError_t kvc_launch_attend_rows_80(void *job, int blocks, int shared_most, cudaStream_t stream);
cudaError_t kvc_launch_attend_rows_96(void *job, int blocks, int shared_most, cudaStream_t stream);
cudaError_t kvc_launch_attend_rows_128(void *job, int blocks, int shared_most, cudaStream_t stream);
cudaError_t kvc_launch_attend_rows_256(void *job, int blocks, int shared_most, cudaStream_t stream);
