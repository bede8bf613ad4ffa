/* parallel.c: a small thread pool. One job at a time; indices are handed out one by one; the caller works too. A forked
 * child finds no workers of its parent's and starts its own. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/core.h"

#define MAX_THREADS 64

static pthread_mutex_t job_lock = PTHREAD_MUTEX_INITIALIZER; /* one job at a time */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;     /* guards what follows */
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int workers, wanted, busy, caller_cpu = -1;
static pthread_t threads_of_pool[MAX_THREADS];
static unsigned long generation;
static atomic_llong next_index;
static struct {
    kvc_body *body;
    void *context;
    int64_t n;
} job;
static int configured;

static int available_cpus(void) {
    const char *text = getenv("KVCOMP_NUM_THREADS");
    if (text && atoi(text) >= 1) return atoi(text) < MAX_THREADS ? atoi(text) : MAX_THREADS;
    cpu_set_t set;
    const int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < MAX_THREADS ? n : MAX_THREADS;
}

int kvc_threads(void) {
    if (!configured) configured = available_cpus();
    return configured;
}

void kvc_set_threads(int threads) { configured = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS; }

static void take(void) {
    for (int64_t i; (i = atomic_fetch_add(&next_index, 1)) < job.n;) job.body(job.context, i);
}

static void *worker(void *argument) {
    unsigned long seen = (unsigned long)(uintptr_t)argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (generation == seen) pthread_cond_wait(&work, &lock);
        seen = generation;
        if (wanted == 0) continue; /* enough others took part */
        wanted--;
        busy++;
        pthread_mutex_unlock(&lock);
        take();
        pthread_mutex_lock(&lock);
        if (--busy == 0) pthread_cond_signal(&done);
    }
    return NULL;
}

static void before_fork(void) {
    pthread_mutex_lock(&job_lock);
    pthread_mutex_lock(&lock);
}

static void parent_after_fork(void) {
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&job_lock);
}

static void child_after_fork(void) {
    workers = wanted = busy = 0;
    caller_cpu = -1;
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&done, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&job_lock, NULL);
}

static void install_fork_handlers(void) { pthread_atfork(before_fork, parent_after_fork, child_after_fork); }

/* Workers stay off the caller's CPU. A woken thread is otherwise often put there, behind the caller, and the other
 * CPU's idle balancing finds it milliseconds later: as long as a whole job takes. Called under the lock. */
static void spread(int first_new) {
    const int cpu = sched_getcpu();
    cpu_set_t set;
    if (cpu < 0 || (cpu == caller_cpu && first_new == workers) || sched_getaffinity(0, sizeof set, &set)) return;
    if (CPU_COUNT(&set) > 1) CPU_CLR(cpu, &set);
    for (int i = cpu == caller_cpu ? first_new : 0; i < workers; i++)
        pthread_setaffinity_np(threads_of_pool[i], sizeof set, &set);
    caller_cpu = cpu;
}

void kvc_parallel(int64_t n, int threads, kvc_body *body, void *context) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (threads <= 0) threads = kvc_threads();
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > n) threads = (int)n;
    if (threads <= 1) {
        for (int64_t i = 0; i < n; i++) body(context, i);
        return;
    }
    pthread_once(&once, install_fork_handlers);
    pthread_mutex_lock(&job_lock);
    pthread_mutex_lock(&lock);
    const int had = workers;
    while (workers < threads - 1) {
        pthread_t *thread = &threads_of_pool[workers];
        if (pthread_create(thread, NULL, worker, (void *)(uintptr_t)generation)) break; /* fewer hands, same result */
        pthread_detach(*thread);
        workers++;
    }
    spread(had);
    job.body = body;
    job.context = context;
    job.n = n;
    atomic_store(&next_index, 0);
    wanted = threads - 1;
    generation++;
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&lock);
    take();
    pthread_mutex_lock(&lock);
    wanted = 0; /* whoever has not woken up by now is not needed */
    while (busy > 0) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&job_lock);
}
