// Runs a function over 0..n in chunks, on a few threads that stay. A layer of a network takes a fraction of a
// millisecond, so a thread that has just worked watches for more for a moment before it sleeps.

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define MAX_WORKERS 63
#define WATCHES 20000  // half a millisecond where a pause is long, as on today's x86; else some tens of microseconds

typedef void (*work)(void *argument, int64_t first, int64_t last);

static struct {
    pthread_mutex_t busy, sleep;
    pthread_cond_t wake;
    int workers;
    // Low byte: how many workers take part; the rest counts calls. One word, so that no worker mixes up two calls.
    atomic_uint_fast64_t call;
    atomic_int_fast64_t next;
    atomic_int running;
    work function;
    void *argument;
    int64_t n, chunk;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_chunks(void) {
    for (;;) {
        int64_t first = atomic_fetch_add(&pool.next, pool.chunk);
        if (first >= pool.n) return;
        int64_t last = first + pool.chunk;
        pool.function(pool.argument, first, last < pool.n ? last : pool.n);
    }
}

static void *worker(void *number) {
    const uint_fast64_t me = (uint_fast64_t)(intptr_t)number;
    uint_fast64_t seen = 0;  // a worker is born into the call that wants it
    for (;;) {
        for (int i = 0; i < WATCHES && atomic_load(&pool.call) == seen; i++) pause_briefly();
        if (atomic_load(&pool.call) == seen) {
            pthread_mutex_lock(&pool.sleep);
            while (atomic_load(&pool.call) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
            pthread_mutex_unlock(&pool.sleep);
        }
        seen = atomic_load(&pool.call);
        if (me < (seen & 0xff)) {
            take_chunks();
            atomic_fetch_sub(&pool.running, 1);
        }
    }
    return NULL;
}

// A child process has none of its parent's threads.
static void after_fork(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.call, 0);
}

static void grow(int workers) {
    if (pool.workers == 0) {
        static atomic_flag registered = ATOMIC_FLAG_INIT;
        if (!atomic_flag_test_and_set(&registered)) pthread_atfork(NULL, NULL, after_fork);
    }
    while (pool.workers < workers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.workers)) return;
        pthread_detach(thread);
        pool.workers++;
    }
}

// function(argument, first, last) over all of 0..n, in chunks, on up to `threads` threads, the caller's among them.
// Returns when all is done. A second caller at the same time works alone.
void sr_parallel(work function, void *argument, int64_t n, int64_t chunk, int64_t threads) {
    if (n <= 0) return;
    int64_t pieces = (n + chunk - 1) / chunk, wanted = (threads < pieces ? threads : pieces) - 1;
    if (wanted <= 0 || pthread_mutex_trylock(&pool.busy)) {
        function(argument, 0, n);
        return;
    }
    grow(wanted < MAX_WORKERS ? (int)wanted : MAX_WORKERS);
    int taking_part = pool.workers < wanted ? pool.workers : (int)wanted;
    pool.function = function;
    pool.argument = argument;
    pool.n = n;
    pool.chunk = chunk;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.running, taking_part);
    pthread_mutex_lock(&pool.sleep);
    atomic_store(&pool.call, (((atomic_load(&pool.call) >> 8) + 1) << 8) | (uint_fast64_t)taking_part);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
    take_chunks();
    for (int i = 0; atomic_load(&pool.running) > 0; i++) {
        if (i < WATCHES) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_unlock(&pool.busy);
}
