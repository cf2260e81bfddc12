// Runs a function over 0..n in chunks, on the threads that torch computes with: threads of our own would have to share
// the cores with torch's, which watch for more work for milliseconds after each of its operations.

#include <stdatomic.h>
#include <stdint.h>

typedef void (*work)(void *argument, int64_t first, int64_t last);
// OpenMP's own entry: calls member(argument) on each thread of a team, and returns when all have.
typedef void (*team)(void (*member)(void *argument), void *argument, unsigned threads, unsigned flags);

struct shared {
    work function;
    void *argument;
    int64_t n, chunk;
    atomic_int_fast64_t next;
};

static void take_chunks(void *argument) {
    struct shared *shared = argument;
    for (;;) {
        int64_t first = atomic_fetch_add(&shared->next, shared->chunk), last = first + shared->chunk;
        if (first >= shared->n) return;
        shared->function(shared->argument, first, last < shared->n ? last : shared->n);
    }
}

// function(argument, first, last) over all of 0..n, in chunks; returns when all is done. run: NULL for this thread
// alone. The team is always torch's whole one, however few the chunks: OpenMP ends the threads that a smaller one
// leaves out, and starts them anew for the next.
void sr_parallel(team run, work function, void *argument, int64_t n, int64_t chunk, int64_t threads) {
    if (n <= 0) return;
    if (!run || threads < 2 || n <= chunk) {
        function(argument, 0, n);
        return;
    }
    struct shared shared = {function, argument, n, chunk, 0};
    run(take_chunks, &shared, (unsigned)threads, 0);
}
